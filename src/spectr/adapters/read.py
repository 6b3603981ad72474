"""Read an adapter, local or from the Hub, into an :class:`Expert`, or find out what else a folder holds."""

from __future__ import annotations

import os
import re
import shutil
import zipfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor

from spectr.adapters.adapter_config import CONFIG_FILE, INITIAL_FILES, MLX, AdapterConfig, InitialSettings, read_config
from spectr.adapters.expert import Expert, FactorShape, open_safetensors
from spectr.adapters.gates import GATES_FILE
from spectr.adapters.saved_parts import SavedParts, plain_name, read_saved
from spectr.adapters.text_facts import TEXT_FACTS_FILE, TEXT_FILES
from spectr.adapters.updates import Parts
from spectr.atomic_write import cache_folder, replacing, save_readable
from spectr.errors import AdapterError, some_of
from spectr.hashing import json_sha256, known_sha256

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
PICKLE_FILE = "adapter_model.bin"
_PICKLES = ("adapter_model.pt", "adapter_model.pth")
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
    elif any(file.endswith(_MLX) for file in top):
        what = MLX
    elif WEIGHTS_FILE + ".index.json" in top:
        what = ("holds its weights in several files", f"save it again with PEFT, which writes one {WEIGHTS_FILE}")
    elif "pytorch_lora_weights.safetensors" in top:
        what = ("is a diffusers LoRA, for an image model", "use an adapter for a transformers model")
    elif pickles := sorted(top & set(_PICKLES)):
        what = (
            f"holds its weights only in {pickles[0]}, which PEFT does not read either",
            f"save it again with PEFT, or rename it to {PICKLE_FILE} if PEFT wrote it",
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


WEIGHTS_FILE = "adapter_model.safetensors"
_FLOATS = ("F64", "F32", "F16", "BF16")

# "<module>.lora_A.weight"; files written by hand may name the adapter: "...lora_A.default.weight".
_MODULE = r"^(?P<module>.+?)\."
_TENSORS = {
    "A": re.compile(_MODULE + r"lora_A(?:\.[^.]+)?\.weight$"),
    "B": re.compile(_MODULE + r"lora_B(?:\.[^.]+)?\.weight$"),
    "bias_B": re.compile(_MODULE + r"lora_B(?:\.[^.]+)?\.bias$"),
    "magnitude": re.compile(_MODULE + r"lora_magnitude_vector(?:\.[^.]+){0,2}$"),
}
_BIAS = re.compile(_MODULE + r"(?:base_layer\.)?bias$")
_WORDS = {"magnitude": "DoRA magnitude", "bias_B": "bias of the B matrix", "bias": "trained bias"}
_HUB_ID = re.compile(r"^(?P<repo>[\w.-]+/[\w.-]+)(?:/(?P<subfolder>[\w./-]+?))?(?:@(?P<revision>[\w./-]+))?$")
_OF_ONE = (CONFIG_FILE, WEIGHTS_FILE, "README.md", "expert.json", GATES_FILE, TEXT_FACTS_FILE)
ADAPTER_FILES = (*_OF_ONE, *INITIAL_FILES)  # all files of one adapter


def read_adapter(source: str | Path, name: str, *, check_values: bool = True) -> Expert:
    """Read an expert from a PEFT folder or a Hub id.

    Args:
        source: A folder, or ``org/repo`` or ``org/repo/subfolder``, optionally with ``@revision``.
        name: The expert's name.
        check_values: Also read all weights, and refuse NaN, infinity and updates that are all zero.

    Raises:
        AdapterError: The adapter is missing, damaged, or cannot be routed exactly.
    """
    folder = _without_pickle(locate_adapter(source, name), name)
    weights = folder / WEIGHTS_FILE
    if not _is_whole(folder) and (error := cause(files_of(folder), name, str(folder))):
        raise error
    config = read_config(folder, name)
    if not weights.is_file():
        raise AdapterError(
            f"expert '{name}': {folder} has no {WEIGHTS_FILE}",
            expected="the weights next to the configuration",
            do="copy or download the adapter again",
        )
    with open_safetensors(weights, name) as file:
        keys = list(file.keys())
        found, others, faults = _sort_keys(keys, config)
        slices = {key: file.get_slice(key) for key in keys}
        shapes = {key: tuple(part.get_shape()) for key, part in slices.items()}
        faults += [f"{k} has dtype {part.get_dtype()}" for k, part in slices.items() if part.get_dtype() not in _FLOATS]
    saved = read_saved(others, shapes, config.saved, config.scale_of, faults)
    if not faults and not found and not saved:
        faults = ["it holds no LoRA factors"]
    _check_gathered(weights, name, shapes)
    targets = config.targets
    targeted = {module for module in found if targets.tied or targets.has(module) or config.may_wrap(module)}
    targeted = targeted or set(found)  # the names are those of older versions
    faults += _ranks_of_embeddings(saved, config)
    ignored: list[str] = []  # of modules that PEFT ignores too
    read = {
        module: _factor_shape(module, parts, shapes, config, faults if module in targeted else ignored)
        for module, parts in found.items()
    }
    if faults:
        shown = "; ".join(faults[:5]) + (f"; and {len(faults) - 5} more" if len(faults) > 5 else "")
        raise AdapterError(
            f"expert '{name}' cannot be routed exactly: {shown}",
            expected="pairs of 2-D factors A (r, in) and B (out, r) of linear layers",
            do="retrain it as plain LoRA on linear layers",
        )
    expert = Expert(
        name=name,
        weights=weights,
        shapes={module: shape for module, shape in sorted(read.items()) if shape and module in targeted},
        base_model=config.base_model,
        origin=str(source),
        saved=saved,
        config=config,
        left_out={module: shape for module, shape in sorted(read.items()) if shape and module not in targeted},
    )
    if config.initial.kind:
        expert = _with_initial(expert, config.initial, folder)
    if check_values:
        expert.check_values()
    return expert


def _ranks_of_embeddings(saved: Mapping[str, SavedParts], config: AdapterConfig) -> Iterator[str]:
    """Ranks that differ from the configuration, of modules that it targets; PEFT loads no others."""
    for module, parts in saved.items():
        own, rank = parts.factors, config.rank_of(module)
        if own and own.rank != rank and (config.targets.tied or config.targets.has(module)):
            yield f"{module} has factors of rank {own.rank} but the configuration says rank {rank}"


def _is_whole(folder: Path) -> bool:
    return (folder / CONFIG_FILE).is_file() and any((folder / file).is_file() for file in (WEIGHTS_FILE, PICKLE_FILE))


def _without_pickle(folder: Path, name: str) -> Path:
    """The folder, or a copy of it in the cache that has the tensors of ``adapter_model.bin`` as safetensors."""
    if (folder / WEIGHTS_FILE).is_file() or not _is_whole(folder):
        return folder
    files = [file for file in (PICKLE_FILE, *ADAPTER_FILES, *TEXT_FILES) if (folder / file).is_file()]
    content = json_sha256({file: known_sha256(folder / file) for file in files})
    copy = cache_folder() / "adapters" / content[:16]
    if not (copy / WEIGHTS_FILE).is_file():
        tensors = _unpickled(folder / PICKLE_FILE, name)
        for file in files[1:]:
            (copy / file).parent.mkdir(parents=True, exist_ok=True)
            with replacing(copy / file) as scratch:
                shutil.copyfile(folder / file, scratch)
        with replacing(copy / WEIGHTS_FILE) as scratch:  # the last file: with it the copy is complete
            save_readable(tensors, scratch, {"format": "pt"})
    return copy


def _unpickled(file: Path, name: str) -> dict[str, Tensor]:
    """A pickle file's tensors. As in PEFT, no code of the file runs."""
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError, OSError, ValueError, zipfile.BadZipFile) as error:
        found = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
    if isinstance(found, dict) and all(isinstance(value, Tensor) for value in found.values()):
        return {key: value.clone(memory_format=torch.contiguous_format) for key, value in found.items()}
    what = found if isinstance(found, str) else "it holds other things"
    raise AdapterError(
        f"expert '{name}': {file} does not hold tensors alone: {what}",
        expected="tensors by name, as PEFT's save_pretrained(safe_serialization=False) writes them",
        do="copy or download it again; if you trust it, load and save it with the version of PEFT that wrote it",
    )


def _with_initial(expert: Expert, settings: InitialSettings, folder: Path) -> Expert:
    """An expert with its initial factors as part of its updates: saved ones, else recomputed as PEFT does."""
    saved = settings.saved_in(folder.absolute())
    first = None if saved is None else read_adapter(saved, expert.name, check_values=False)
    found = {**expert.shapes, **expert.left_out}
    if first is not None:
        sizes = {module: shape[1:3] for module, shape in {**first.shapes, **first.left_out}.items()}
        wrong = [module for module, shape in found.items() if sizes.get(module) != shape[1:3]]
        if wrong or first.kinds:
            what = f"differ in the modules {some_of(wrong, 3)}" if wrong else f"are {', '.join(first.kinds)} themselves"
            raise AdapterError(
                f"expert '{expert.name}': the initial factors in {saved} {what}",
                expected="the adapter as it was before training, saved with init_lora_weights=True",
                do=f"save it again, or delete {settings.folder}",
            )
        first = replace(first, shapes={**first.shapes, **first.left_out})

    def whole(shapes: Mapping[str, FactorShape]) -> dict[str, FactorShape]:
        ranks = {module: shape.rank if first is None else first.shapes[module].rank for module, shape in shapes.items()}
        return {
            module: shape._replace(
                rank=shape.rank + ranks[module],
                parts=shape.parts._replace(initial=settings.name, initial_rank=ranks[module]),
            )
            for module, shape in shapes.items()
        }

    return replace(expert, shapes=whole(expert.shapes), left_out=whole(expert.left_out), initial=first)


def _check_gathered(weights: Path, name: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise :class:`AdapterError` if tensors are empty."""
    empty = [key for key, shape in shapes.items() if 0 in shape]
    if empty:
        raise AdapterError(
            f"expert '{name}': {len(empty)} of {len(shapes)} tensors in {weights} are empty "
            f"({some_of(empty, 2)}). DeepSpeed ZeRO-3 writes such files if it does not gather its partitions",
            expected="complete factors",
            do="gather them from the run's checkpoint with its zero_to_fp32.py, or save again with "
            "stage3_gather_16bit_weights_on_model_save",
        )


def _factor_shape(
    module: str,
    parts: dict[str, str],
    shapes: dict[str, tuple[int, ...]],
    config: AdapterConfig,
    faults: list[str],
) -> FactorShape | None:
    if "A" not in parts or "B" not in parts:
        return None  # reported already
    A, B = shapes[parts["A"]], shapes[parts["B"]]
    rank = config.rank_of(module)
    if len(A) != 2 or len(B) != 2:
        faults.append(f"{module} has factors of shapes {A} and {B} (a convolution?)")
        return None
    several = config.target_parameters and A[0] == B[1]  # of a fused parameter, whose matrices only a model knows
    if not A[0] == B[1] == rank and not several:
        faults.append(f"{module} has factors of shapes {A} and {B} but the configuration says rank {rank}")
    more = Parts(**{part: key for part, key in parts.items() if part in Parts._fields})  # pyright: ignore[reportArgumentType]
    faults += [f"{key} has shape {shapes[key]}, not {B[:1]}" for key in more.tensors if shapes[key] != B[:1]]
    return FactorShape(A[0], A[1], B[0], config.scale_of(module), parts["A"], parts["B"], more)


def _sort_keys(keys: Iterable[str], config: AdapterConfig) -> tuple[dict[str, dict[str, str]], list[str], list[str]]:
    """Sort tensor names into ``{module: {part: key}}`` and names outside of updates, and list the faults."""
    found: dict[str, dict[str, str]] = {}
    others: list[str] = []
    faults: list[str] = []
    for key in sorted(keys):
        plain = plain_name(key)
        part, match = next(((part, m) for part, form in _TENSORS.items() if (m := form.match(plain))), ("", None))
        if "modules_to_save" in key:
            faults.append(f"{key} is a whole trained module")
        elif not match:
            others.append(key)
        elif not config.has(part):
            faults.append(f"{key} is a {_WORDS[part]}, which the configuration does not mention")
        else:
            faults += _put(found.setdefault(match["module"], {}), part, key, match["module"])
    faults += [fault for module, parts in found.items() for fault in _lacks(module, parts, config)]
    if not config.trained_bias:
        return found, others, faults
    for key in list(others):
        match = _BIAS.match(plain_name(key))
        if match and match["module"] in found:
            others.remove(key)
            faults += _put(found[match["module"]], "bias", key, match["module"])
    return found, others, faults


def _put(parts: dict[str, str], part: str, key: str, module: str) -> Iterator[str]:
    if part in parts:
        what = f"factor {part}" if part in "AB" else _WORDS[part]
        yield f"{module} has more than one {what} (several adapters in one file)"
    parts[part] = key


def _lacks(module: str, parts: Mapping[str, str], config: AdapterConfig) -> Iterator[str]:
    factors = parts.keys() & {"A", "B"}
    if not factors:
        yield f"{module} has a {' and a '.join(_WORDS[part] for part in parts)}, but no factors of a linear layer"
    elif len(factors) < 2:
        yield f"{module} has only one factor"
    else:
        missing = [part for part in ("magnitude", "bias_B") if config.has(part) and part not in parts]
        yield from (f"{module} has no {_WORDS[part]}, which the configuration mentions" for part in missing)


def locate_adapter(source: str | Path, name: str) -> Path:
    """The folder of an adapter; downloads it if ``source`` is a Hub id.

    Raises:
        AdapterError: The folder does not exist, and the Hub did not return the repository.
    """
    folder = Path(os.path.expanduser(source))
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise AdapterError(
            f"expert '{name}': {source} is a file", expected="a folder with adapter_config.json", do="pass its folder"
        )
    match = _HUB_ID.match(str(source))
    if not match or folder.is_absolute() or str(source).startswith("."):
        raise AdapterError(
            f"expert '{name}': there is no folder {source}",
            expected="a folder with adapter_config.json, or a Hub id like org/repo",
            do="check the path",
        )
    return _from_hub(name, **match.groupdict())


def _from_hub(name: str, repo: str, subfolder: str | None, revision: str | None) -> Path:
    from huggingface_hub import HfApi, snapshot_download

    inside = f"{subfolder}/" if subfolder else ""
    try:
        root = snapshot_download(
            repo, revision=revision, allow_patterns=[inside + file for file in (*ADAPTER_FILES, *TEXT_FILES)]
        )
        folder = Path(root) / (subfolder or "")
        if not (folder / WEIGHTS_FILE).is_file():
            snapshot_download(repo, revision=revision, allow_patterns=[inside + PICKLE_FILE])
        files = [] if _is_whole(folder) else HfApi().list_repo_files(repo, revision=revision)
    except Exception as error:  # the client raises its own errors, httpx's and the system's
        raise AdapterError(
            f"expert '{name}': '{repo}{inside and '/' + inside}' is not a folder, and the Hub did not return it: "
            f"{type(error).__name__}",
            expected="an existing folder, or a Hub id that this machine can reach",
            do="check the name, the network, and whether the repository needs a login (hf auth login)",
        ) from error
    there = [file.removeprefix(inside) for file in files if file.startswith(inside)]
    if error := cause(there, name, f"{repo}{inside and '/' + inside.rstrip('/')}"):
        raise error
    return folder
