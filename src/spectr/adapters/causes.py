"""What a folder is that is not an adapter of PEFT, and what to do with it."""

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
    """The folders with an adapter among relative paths of files; of a training run, the last checkpoint first."""
    found = {file.rpartition("/")[0] for file in files if file.rpartition("/")[2] == CONFIG_FILE} - {""}
    return sorted(found, key=lambda folder: (-_step(folder), folder))


def stages(names: Sequence[str]) -> bool:
    """Whether folders are several checkpoints of one training run."""
    return len(names) > 1 and all(_CHECKPOINT.fullmatch(name) for name in names)


def files_of(folder: Path) -> list[str]:
    """Relative paths of the files of a folder and of the folders in it."""
    return [path.relative_to(folder).as_posix() for path in (*folder.glob("*"), *folder.glob("*/*")) if path.is_file()]


def cause(files: Collection[str], name: str, place: str) -> AdapterError | None:
    """Why a folder cannot be read as one adapter, by its files' names; ``None`` where they do not say.

    Args:
        files: Paths relative to the folder.
        name: Of the expert.
        place: The folder, or what is like it, in words.
    """
    inner, top = adapter_folders(files), {file for file in files if "/" not in file}
    what: tuple[str, str] | None = None
    if inner and CONFIG_FILE not in top:
        kind = "the checkpoints of a training run" if stages(inner) else "adapters in folders of their own"
        what = (f"holds {kind}: {some_of(inner, 5)}", f"give one of them: {place}/{inner[0]}")
    elif top & set(_MLX):
        what = (
            "is an adapter of mlx-lm, which keeps its factors transposed and under other names",
            "fuse it: mlx_lm.fuse --model BASE --adapter-path FOLDER --save-path MERGED; then take an expert from the "
            "result: spectr extract MERGED --base BASE",
        )
    elif "pytorch_lora_weights.safetensors" in top:
        what = ("is a LoRA of diffusers, for a model that makes pictures", "give an adapter of a transformers model")
    elif pickles := sorted(top & set(_PICKLES)):
        what = (
            f"holds its weights only as a pickle file ({pickles[0]}), which can run code",
            "if you trust it, load it with PEFT and save it again with safe_serialization=True",
        )
    elif any(file.endswith(".gguf") for file in top):
        what = ("holds a GGUF file of llama.cpp", "give the adapter of PEFT that it was made from")
    elif "zero_to_fp32.py" in top or any(file.startswith("global_step") for file in files):
        what = ("is a checkpoint of DeepSpeed", "run its zero_to_fp32.py, and save the adapter with PEFT")
    elif top & _WHOLE_MODELS:
        what = ("holds a whole model", "take an expert from it: spectr extract FOLDER --base BASE")
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
