"""Make experts from other weights: from fully fine-tuned models, and from experts of higher rank."""

from spectr.extraction.extract import extract
from spectr.extraction.extraction_settings import Extraction, Truncation
from spectr.extraction.outcome import Kept, KindSummary, Left, Place, Report, Spread, places, summary
from spectr.extraction.rerank import rerank

__all__ = [
    "Extraction",
    "Kept",
    "KindSummary",
    "Left",
    "Place",
    "Report",
    "Spread",
    "Truncation",
    "extract",
    "places",
    "rerank",
    "summary",
]
