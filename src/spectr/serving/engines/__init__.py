"""What each engine needs, behind one protocol."""

from spectr.serving.engines.base import Engine, EngineRefusal, Recording, Step, Ticket

__all__ = ["Engine", "EngineRefusal", "Recording", "Step", "Ticket"]
