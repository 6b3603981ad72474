"""Read ``adapter_config.json``: every module's scale, the initialisation, and whether it can be routed exactly."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from spectr.adapters.saved_parts import NOTHING_SAVED, SavedSettings
from spectr.adapters.targets import Targets, target_faults
from spectr.errors import AdapterError
from spectr.folders import json_object

_FILES = ("adapter_config.json", "adapter_model.safetensors")
_KINDS = re.compile(r"(pissa_niter_\d+|pissa|olora|corda|lora_ga)", re.IGNORECASE)
_NAMES = {"pissa": "PiSSA", "olora": "OLoRA", "corda": "CorDA", "lora_ga": "LoRA-GA"}
# Subfolders of an adapter that may hold its initial factors as an adapter.
INITIAL_FILES = tuple(f"{kind}_init/{file}" for kind in _NAMES for file in _FILES)


class InitialSettings(NamedTuple):
    """How an adapter was initialised.

    Attributes:
        kind: ``"pissa"``, ``"olora"``, ``"corda"`` or ``"lora_ga"``; empty if the base weight is unchanged.
        computed: Whether PEFT can recompute the same initial factors from the base weight.
    """

    kind: str = ""
    computed: bool = False

    @staticmethod
    def of(raw: Mapping[str, Any]) -> InitialSettings:
        """Read PEFT's configuration."""
        given = raw.get("init_lora_weights")
        match = _KINDS.fullmatch(given) if isinstance(given, str) else None
        if match is None:
            return InitialSettings()
        kind = match[1].lower()
        return InitialSettings(kind.partition("_niter_")[0], given == "pissa" or kind == "olora")

    @property
    def name(self) -> str:
        """The name of the initialisation."""
        return _NAMES.get(self.kind, "")

    @property
    def folder(self) -> str:
        """The subfolder of saved initial factors."""
        return f"{self.kind}_init"

    def saved_in(self, folder: Path) -> Path | None:
        """Where an adapter's initial factors are saved; ``None`` if they are not."""
        found = folder / self.folder
        return found if self.kind and (found / _FILES[1]).is_file() else None

    def faults(self, folder: Path) -> Iterator[str]:
        """What is wrong if they are needed and not saved."""
        if self.kind and not self.computed and self.saved_in(folder) is None:
            yield (
                f"init_lora_weights names {self.name}, which moves initial factors out of the base model's weights. "
                f"They cannot be recomputed, and the adapter has none in {self.folder}"
            )


NOT_FROM_BASE = InitialSettings()


CONFIG_FILE = "adapter_config.json"
WRAPPED = ".base_layer"  # follows a module's name, once for each further parameter that PEFT wraps in it

# Settings with which the adapter computes something other than scale * B @ A * x.
_REFUSED: dict[str, str] = {
    "layer_replication": "it duplicates layers of the base model",
    "use_qalora": "QA-LoRA pools the input of A",
    "alora_invocation_tokens": "an activated LoRA starts at invocation tokens only",
    "use_bdlora": "its factors are block-diagonal",
    "arrow_config": "it routes other adapters",
    "monteclora_config": "its factors are random variables",
    "kasa_config": "KaSA changes the base weight",
    "velora_config": "VeLoRA settings may change the forward pass",
    "megatron_config": "it is for Megatron's parallel layers",
}
# What an mlx-lm adapter is, and what to do with it.
MLX = (
    "is an mlx-lm adapter, which stores transposed factors under other names",
    "fuse it: mlx_lm.fuse --model BASE --adapter-path FOLDER --save-path MERGED; then extract an expert: "
    "spectr extract MERGED --base BASE",
)
DEFAULTS = {"r": 8, "lora_alpha": 8}  # PEFT's, of settings that a file may lack
_TOKENS_ALONE = "TRAINABLE_TOKENS"  # no factors, only trained rows of the embedding
# Adapter types that PEFT's save_as_lora converts to LoRA.
_CONVERTIBLE = {
    *("C3A", "DELORA", "FOURIERFT", "GRALORA", "HIRA", "LOHA", "LOKR", "MISS", "PSOFT", "RANDLORA", "SHIRA"),
    *("TINYLORA", "UNILORA", "VBLORA", "VERA", "WAVEFT"),
}
# Settings that do not change the forward pass of a loaded adapter.
_HARMLESS = {
    *("peft_type", "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode"),
    *("r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "fan_in_fan_out", "bias"),
    *("modules_to_save", "trainable_token_indices", "token_indices", "init_weights", "merge_weights"),
    "target_parameters",
    *("use_rslora", "use_dora", "lora_bias", "init_lora_weights", "layers_to_transform", "layers_pattern"),
    "rank_pattern",
    *("alpha_pattern", "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    *(
        "qalora_group_size",
        "ensure_weight_tying",
        "runtime_config",
        "peft_version",
        "tp_plan",
        "parent_library",
    ),
}


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """The part of a LoRA configuration that routing needs.

    Attributes:
        dora: Whether each module has DoRA magnitudes.
        lora_bias: Whether ``B`` has a bias.
        trained_bias: Whether the file holds biases that replace the base model's.
        initial: How it was initialised.
        task: PEFT's task type, such as ``"SEQ_CLS"``; empty if there is none.
    """

    rank: int
    alpha: float
    rslora: bool
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    base_model: str | None
    dora: bool = False
    lora_bias: bool = False
    trained_bias: bool = False
    initial: InitialSettings = NOT_FROM_BASE
    saved: SavedSettings = NOTHING_SAVED
    targets: Targets = field(default_factory=Targets)
    target_parameters: tuple[str, ...] = ()
    task: str = ""

    def rank_of(self, module: str) -> int:
        """Rank of a module: the first matching entry of ``rank_pattern``, else ``r``."""
        return int(_by_pattern(self.rank_pattern, module, self.rank))

    def targets_parameter(self, name: str) -> bool:
        """PEFT's rule: whether ``target_parameters`` lists a parameter's name or its ending."""
        return any(name == target or name.endswith(f".{target}") for target in self.target_parameters)

    def may_wrap(self, module: str) -> bool:
        """Whether factors of this name may belong to a parameter of the module; only the model can tell."""
        if not self.target_parameters or module.endswith(WRAPPED):
            return bool(self.target_parameters)
        holders = {target.rpartition(".")[0] for target in self.target_parameters}
        if any(holder and f".{module}".endswith(f".{holder}") for holder in holders):
            return True
        return "" in holders and not self.targets.has(module)

    def scale_of(self, module: str) -> float:
        """``alpha / r``, or ``alpha / sqrt(r)`` for rsLoRA, with the module's own rank and alpha."""
        rank, alpha = self.rank_of(module), _by_pattern(self.alpha_pattern, module, self.alpha)
        return alpha / (math.sqrt(rank) if self.rslora else rank)

    def has(self, part: str) -> bool:
        """Whether every adapted layer has this part. Every adapted layer has factors."""
        return {"magnitude": self.dora, "bias_B": self.lora_bias}.get(part, True)


def read_config(folder: Path, name: str) -> AdapterConfig:
    """Read and check an adapter's configuration.

    Raises:
        AdapterError: ``adapter_config.json`` is missing or unreadable, the ``peft_type`` is not LoRA, or settings
            cannot be routed exactly. The error names every such setting.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise AdapterError(
            f"expert '{name}': {folder} has no {CONFIG_FILE}",
            expected="a folder as PEFT's save_pretrained writes it",
            do="pass the folder of one adapter",
        )
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:  # JSON's own error, and text that is not UTF-8
        raw = None
    if not isinstance(raw, dict):
        raise AdapterError(f"expert '{name}': {path} is not a JSON object", do="save or download it again")
    raw = {**DEFAULTS, **raw}
    faults = _faults(raw, folder)
    if faults:
        raise AdapterError(
            f"expert '{name}' cannot be routed exactly: {'; '.join(faults)}",
            expected="a plain LoRA adapter, whose update is scale * B @ A",
            do=_cure(raw),
        )
    return AdapterConfig(
        rank=raw.get("r", 0),
        alpha=raw.get("lora_alpha", 0),
        rslora=bool(raw.get("use_rslora")),
        rank_pattern=raw.get("rank_pattern") or {},
        alpha_pattern=raw.get("alpha_pattern") or {},
        base_model=raw.get("base_model_name_or_path"),
        saved=SavedSettings.of(raw),
        targets=Targets.of(raw),
        dora=bool(raw.get("use_dora")),
        lora_bias=bool(raw.get("lora_bias")),
        trained_bias=raw.get("bias", "none") != "none",
        target_parameters=tuple(raw.get("target_parameters") or ()),
        initial=InitialSettings.of(raw),
        task=str(raw.get("task_type") or ""),
    )


def base_named(folder: Path) -> str | None:
    """The base model in an adapter's configuration, if it can be read."""
    named = json_object(folder / CONFIG_FILE).get("base_model_name_or_path")
    return named if isinstance(named, str) and named else None


def _faults(raw: dict[str, Any], folder: Path) -> list[str]:
    if wrong := list(_type_faults(raw)):
        return wrong
    if raw.get("peft_type") == _TOKENS_ALONE:
        return list(SavedSettings.of(raw).faults())
    if _is_mlx(raw):
        return [f"it {MLX[0]}"]
    if raw.get("peft_type") != "LORA":
        return [f"peft_type is {raw.get('peft_type')!r}, not 'LORA'"]
    faults = [f"{key} is set ({why})" for key, why in _REFUSED.items() if raw.get(key)]
    if raw.get("bias", "none") not in ("none", "lora_only", "all"):
        faults.append(f"bias is {raw['bias']!r}")
    if raw.get("init_lora_weights") == "loftq":
        faults.append("init_lora_weights is 'loftq' (it also changes the base model's weights)")
    if raw.get("lora_bias") and (raw.get("use_dora") or raw.get("init_lora_weights", True) not in (True, False)):
        faults.append("lora_bias is set with use_dora or with other initial factors, which PEFT refuses")
    faults += InitialSettings.of(raw).faults(folder)
    unknown = sorted(key for key, value in raw.items() if value and key not in _HARMLESS and key not in _REFUSED)
    faults += [f"{key} is set, and this version does not know its effect" for key in unknown]
    faults += [f"r is {raw.get('r')!r}"] if not _is_rank(raw.get("r")) else []
    faults += [f"lora_alpha is {raw.get('lora_alpha')!r}"] if not _is_number(raw.get("lora_alpha")) else []
    for key, right in (("rank_pattern", _is_rank), ("alpha_pattern", _is_number)):
        faults += [f"{key} is {raw[key]!r}"] if not _is_pattern(raw.get(key) or {}, right) else []
    return [*faults, *SavedSettings.of(raw).faults(), *target_faults(raw)]


def _type_faults(raw: dict[str, Any]) -> Iterator[str]:
    """Settings whose types are not those of PEFT's configurations; all others are checked by their values."""
    if not isinstance(raw.get("base_model_name_or_path") or "", str):
        yield f"base_model_name_or_path is {raw['base_model_name_or_path']!r}"
    for key in ("modules_to_save", "target_parameters"):
        value = raw.get(key) or []
        if not (isinstance(value, list) and all(isinstance(text, str) for text in value)):
            yield f"{key} is {value!r}"
    for key in ("trainable_token_indices", "token_indices"):
        value = raw.get(key) or []
        if not all(isinstance(tokens, list) for tokens in (value.values() if isinstance(value, dict) else [value])):
            yield f"{key} is {value!r}"


def _is_mlx(raw: dict[str, Any]) -> bool:
    return "peft_type" not in raw and "lora_parameters" in raw


def _cure(raw: dict[str, Any]) -> str:
    if _is_mlx(raw):
        return MLX[1]
    initial = InitialSettings.of(raw)
    if initial.kind:
        return (
            f"save the adapter before training into {initial.folder}, with init_lora_weights=True; or let PEFT "
            "convert it: save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )
    if raw.get("peft_type") not in _CONVERTIBLE:
        return "retrain it as plain LoRA, or extract an expert from the merged model"
    return (
        "load it with PEFT and convert it: peft.tuners.lora.conversion.save_as_lora(FOLDER, peft_model, rank=...); a "
        "larger rank is closer to the original"
    )


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_pattern(patterns: Any, right: Callable[[Any], bool]) -> bool:
    try:
        return isinstance(patterns, dict) and all(re.compile(key) and right(v) for key, v in patterns.items())
    except re.error:
        return False


def _by_pattern(patterns: dict[str, Any], module: str, default: Any) -> Any:
    """PEFT's rule: a key is a regular expression for the end of a module's name, or the name as it is."""
    for key, value in patterns.items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return patterns.get(module, default)
