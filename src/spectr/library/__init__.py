"""Experts on disk: PEFT folders and a manifest that says which of them count."""

from spectr.library.calibration import Calibration, Statistics
from spectr.library.index import Index, IndexEntry
from spectr.library.library import ExpertLibrary
from spectr.library.manifest import Entry, Manifest
from spectr.library.store import LibraryStore

__all__ = ["Calibration", "Entry", "ExpertLibrary", "Index", "IndexEntry", "LibraryStore", "Manifest", "Statistics"]
