"""Remarks on an expert that was added to a library."""

from __future__ import annotations

import shlex
from collections.abc import Iterator

from spectr.adapters import WEIGHTS_FILE
from spectr.adapters.base_names import same_base
from spectr.adapters.text_facts import text_remarks
from spectr.library.calibration_file import Calibration
from spectr.library.index import INDEX_FOLDER
from spectr.library.manifest import Entry, any_entry
from spectr.library.store import LibraryStore


def added_remarks(store: LibraryStore, entry: Entry) -> Iterator[str]:
    """What a user should know about an expert that was just added, and the next command."""
    for remark in text_remarks(store.root / entry.folder, entry.base_model):
        yield f"'{entry.name}' {remark}"
    for name in store.duplicates(entry):
        yield f"'{name}' has the same files: a router that decides for each token counts the expert twice"
    other = any_entry(store.root, but=entry.name)
    if other and not same_base(other.base_model or "", entry.base_model or ""):
        bases = f"'{entry.base_model or 'nothing'}', that of '{other.name}' '{other.base_model or 'nothing'}'"
        yield f"its configuration names the base model {bases}; the sizes agree, but check that it is the same model"
    known = Calibration.load(store.root)
    if known is None or known.sha256.get(entry.name) != entry.sha256[WEIGHTS_FILE]:
        steps = ("calibrate", "index") if (store.root / INDEX_FOLDER).is_dir() else ("calibrate",)
        commands = (f"spectr library {step} --library {shlex.quote(str(store.root))}" for step in steps)
        yield f"not calibrated yet; after you have added all experts, run: {', then '.join(commands)}"
