"""Find out what a folder is if it is not a PEFT adapter, and what to do with it."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path

from spectr.adapters.config import CONFIG_FILE
from spectr.errors import AdapterError, some_of

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_PICKLES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth")
_WHOLE_MODELS = {f"{file}{end}" for file in ("model.safetensors", "pytorch_model.bin") for end in ("", ".index.json")}
_MLX = ("adapters.safetensors", "adapters.npz")


def adapter_folders(files: Collection[str]) -> list[str]:
    """Folders with an adapter among relative paths of files. For a training run, the last checkpoint comes first."""
    found = {file.rpartition("/")[0] for file in files if file.rpartition("/")[2] == CONFIG_FILE} - {""}
    return sorted(found, key=lambda folder: (-_step(folder), folder))


def stages(names: Sequence[str]) -> bool:
    """Whether folders are several checkpoints of one training run."""
    return len(names) > 1 and all(_CHECKPOINT.fullmatch(name) for name in names)


def files_of(folder: Path) -> list[str]:
    """Relative paths of all files in a folder and its subfolders."""
    return [path.relative_to(folder).as_posix() for path in (*folder.glob("*"), *folder.glob("*/*")) if path.is_file()]


def cause(files: Collection[str], name: str, place: str) -> AdapterError | None:
    """Why a folder cannot be read as one adapter, judged by its file names; ``None`` if they do not tell.

    Args:
        files: Paths relative to the folder.
        name: The expert's name.
        place: The folder, or a description of it.
    """
    inner, top = adapter_folders(files), {file for file in files if "/" not in file}
    what: tuple[str, str] | None = None
    if inner and CONFIG_FILE not in top:
        kind = "the checkpoints of a training run" if stages(inner) else "several adapters in subfolders"
        what = (f"holds {kind}: {some_of(inner, 5)}", f"use one of them: {place}/{inner[0]}")
    elif top & set(_MLX):
        what = (
            "is an mlx-lm adapter, which stores transposed factors under other names",
            "fuse it: mlx_lm.fuse --model BASE --adapter-path FOLDER --save-path MERGED; then extract an expert: "
            "spectr extract MERGED --base BASE",
        )
    elif "pytorch_lora_weights.safetensors" in top:
        what = ("is a diffusers LoRA, for an image model", "use an adapter for a transformers model")
    elif pickles := sorted(top & set(_PICKLES)):
        what = (
            f"holds its weights only as a pickle file ({pickles[0]}), which can run code when it is loaded",
            "if you trust it, load it with PEFT and save it again with safe_serialization=True",
        )
    elif any(file.endswith(".gguf") for file in top):
        what = ("holds a llama.cpp GGUF file", "use the PEFT adapter that it was converted from")
    elif "zero_to_fp32.py" in top or any(file.startswith("global_step") for file in files):
        what = ("is a DeepSpeed checkpoint", "run its zero_to_fp32.py, and save the adapter with PEFT")
    elif top & _WHOLE_MODELS:
        what = ("holds a whole model", "extract an expert from it: spectr extract FOLDER --base BASE")
    if what is None:
        return None
    return AdapterError(
        f"expert '{name}': {place} {what[0]}",
        expected=f"one adapter, as PEFT's save_pretrained writes it: {CONFIG_FILE} and adapter_model.safetensors",
        do=what[1],
    )


def _step(folder: str) -> int:
    match = _CHECKPOINT.fullmatch(folder.rpartition("/")[2])
    return int(match[1]) if match else -1
