"""What each engine needs, behind one protocol."""

from spectr.serving.engines.base import Engine, Recording, RefusalError, Step, Ticket

__all__ = ["Engine", "Recording", "RefusalError", "Step", "Ticket"]
