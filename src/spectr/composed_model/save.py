"""Writing a composed model as one folder that transformers and vLLM load."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from spectr.composed_model.settings import Settings
from spectr.composition import Routed
from spectr.errors import CompositionError
from spectr.folders import check_new_folder, new_folder
from spectr.library import ExpertLibrary, LibraryStore
from spectr.library.descriptions import write_descriptions
from spectr.library.needs import DESCRIBED
from spectr.routers import Router, residents
from spectr.routers.config import router_config

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EXPERTS = "experts"
_ELSEWHERE = "name another one, or say --overwrite"
Progress = Callable[[str, int, int], None]


def save_composed(
    routed: Routed,
    tokenizer: PreTrainedTokenizerBase,
    out: str | Path,
    *,
    access: str = "open",
    record: bool = False,
    overwrite: bool = False,
    progress: Progress = lambda *_: None,
) -> Path:
    """Write base model, tokenizer and the experts that are allowed into one folder, all of it or nothing.

    The experts are an ordinary library in ``experts/``, and the config's ``quantization_config`` says how they are
    routed. :func:`load_composed` gives the same composed model again, and vLLM serves it.

    Args:
        routed: The handle of a composed model.
        tokenizer: Its tokenizer.
        out: The folder.
        access: In vLLM, what a request gets that names no experts: ``"open"`` all, ``"closed"`` the base model alone.
        record: In vLLM, whether layers keep what they choose, for requests that ask.
        overwrite: Replace what is in the folder.
        progress: Receives (what, done, total).

    Returns:
        The folder.

    Raises:
        CompositionError: The folder is in use or cannot be written, or the router cannot be written down.
    """
    out = Path(out)
    settings = check_saving(routed.router, routed.experts, out, access=access, record=record, overwrite=overwrite)
    with new_folder(out, CompositionError, _ELSEWHERE, overwrite=overwrite) as folder:
        progress("writing the base model", 0, 1)
        _save_base(routed, tokenizer, folder, settings)
        progress("writing the base model", 1, 1)
        _save_experts(routed.library, routed.experts, folder / EXPERTS, progress)
    return out


def check_saving(
    router: Router,
    experts: Sequence[str],
    out: Path,
    *,
    access: str = "open",
    record: bool = False,
    overwrite: bool = False,
) -> Settings:
    """What :func:`save_composed` would write down, checked without a model.

    Args:
        router: Of the composed model.
        experts: Those that are to be written.
        out: See :func:`save_composed`, as the rest.

    Raises:
        CompositionError: The folder is in use or cannot be made, or the router cannot be written down.
    """
    if DESCRIBED in router.needs or (router.policy is not None and router.policy.pages):
        raise CompositionError(
            f"{router} needs more than a folder holds",
            expected="a router without a guide or a shortlist, such as spectr or calibrated",
            do="save it with another router",
        )
    residents(router, tuple(experts))  # as whoever loads the folder will ask
    settings = Settings(library=EXPERTS, router=router_config(router), access=access, record=record)
    settings.check()
    check_folder(out, overwrite)
    return settings


def _save_base(routed: Routed, tokenizer: PreTrainedTokenizerBase, folder: Path, settings: Settings) -> None:
    """The plain model, saved by itself, with one entry more in its config."""
    model = routed.model
    if getattr(model.config, "quantization_config", None) is not None:
        raise CompositionError(
            "the base model is quantised, and such a folder has no place for two quantisations yet",
            do="save the base model in bfloat16; for vLLM name the library by hf_overrides, see docs/howto/vllm.md",
        )
    model.save_pretrained(folder)  # pyright: ignore[reportCallIssue]
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = settings.as_config()
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for file in filter(Path.is_file, folder.iterdir()):
        file.chmod(0o644)  # safetensors writes files that their owner alone can read


def _save_experts(library: ExpertLibrary, names: tuple[str, ...], root: Path, progress: Progress) -> None:
    store = LibraryStore(root)
    for done, name in enumerate(names, start=1):
        store.add(name, library[name].weights.parent)
        progress("copying experts", done, len(names))
    if library.calibration is not None:
        library.calibration.save(root)
    kept = {name: text for name, text in library.descriptions.items() if name in names}
    if kept:
        write_descriptions(root, kept)


def check_folder(out: Path, overwrite: bool) -> None:
    """Raise :class:`CompositionError` where no composed model can be written."""
    check_new_folder(out, CompositionError, _ELSEWHERE, overwrite=overwrite)
