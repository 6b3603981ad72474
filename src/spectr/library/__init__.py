"""Experts on disk: PEFT folders, and the entries that list them."""

from spectr.library.calibration_file import Calibration, Statistics
from spectr.library.index import Index, IndexEntry
from spectr.library.library import ExpertLibrary
from spectr.library.manifest import Entry
from spectr.library.store import LibraryStore

__all__ = ["Calibration", "Entry", "ExpertLibrary", "Index", "IndexEntry", "LibraryStore", "Statistics"]
