"""What each engine needs, behind one protocol."""

from spectr.serving.api_errors import RefusalError
from spectr.serving.engines.engine import Engine, Recording, Step, Ticket

__all__ = ["Engine", "Recording", "RefusalError", "Step", "Ticket"]
