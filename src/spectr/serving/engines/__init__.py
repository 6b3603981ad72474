"""What each engine needs, behind one protocol."""

from spectr.serving.engines.base import Engine, Recording, Step, Ticket
from spectr.serving.errors import RefusalError

__all__ = ["Engine", "Recording", "RefusalError", "Step", "Ticket"]
