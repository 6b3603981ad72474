"""Write a composed model as one folder that transformers and vLLM load."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from spectr.composed_model.quantization_config import Settings
from spectr.composition import Routed
from spectr.errors import CompositionError, page
from spectr.folders import check_new_folder, new_folder
from spectr.library import ExpertLibrary, LibraryStore
from spectr.library.description_file import write_descriptions
from spectr.library.needs import DESCRIBED
from spectr.routers import Router, residents
from spectr.routers.router_config import router_config

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EXPERTS = "experts"
_ELSEWHERE = "choose another folder, or use --overwrite"
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
    """Write the base model, the tokenizer and the allowed experts into one folder, atomically.

    The experts become an ordinary library in ``experts/``. The config's ``quantization_config`` describes the routing.
    :func:`load_composed` restores the same composed model, and vLLM serves it.

    Args:
        routed: The handle of a composed model.
        tokenizer: Its tokenizer.
        out: The folder.
        access: In vLLM, what a request that names no experts gets: ``"open"`` all, ``"closed"`` the base model alone.
        record: In vLLM, whether layers record their choices, for requests that ask for them.
        overwrite: Replace the folder's content.
        progress: Called with (what, done, total).

    Returns:
        The folder.

    Raises:
        CompositionError: The folder is not empty or cannot be written, or the router cannot be saved.
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
    """Check, without a model, what :func:`save_composed` would write.

    Args:
        router: Router of the composed model.
        experts: The experts to write.
        out: See :func:`save_composed`, as for the others.

    Raises:
        CompositionError: The folder is not empty or cannot be created, or the router cannot be saved.
    """
    if DESCRIBED in router.needs or (router.policy is not None and router.policy.pages):
        raise CompositionError(
            f"{router} needs more than a composed folder can hold",
            expected="a router without a guide or a shortlist, such as spectr or calibrated",
            do="save it with another router",
        )
    residents(router, tuple(experts))  # loading the folder checks the same
    settings = Settings(library=EXPERTS, router=router_config(router), access=access, record=record)
    settings.check()
    check_folder(out, overwrite)
    return settings


def _save_base(routed: Routed, tokenizer: PreTrainedTokenizerBase, folder: Path, settings: Settings) -> None:
    """Save the plain model, with one more entry in its config."""
    model = routed.model
    if getattr(model.config, "quantization_config", None) is not None:
        raise CompositionError(
            "the base model is quantised, and a composed folder cannot describe a quantised model yet",
            do=f"save the base model in bfloat16; for vLLM, name the library with hf_overrides: {page('howto/vllm')}",
        )
    model.save_pretrained(folder)  # pyright: ignore[reportCallIssue]
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = settings.as_config()
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for file in filter(Path.is_file, folder.iterdir()):
        file.chmod(0o644)  # safetensors writes private files


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
    """Raise :class:`CompositionError` if no composed model can be written here."""
    check_new_folder(out, CompositionError, _ELSEWHERE, overwrite=overwrite)
