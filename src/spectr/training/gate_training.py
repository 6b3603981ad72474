"""PHATGOOSE gates: for a finished expert, one vector per module, trained with base model and expert frozen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spectr.adapters import GATES_FILE, Expert, Update, named_for, write_gates
from spectr.atomic_write import replacing
from spectr.composition.find_weight_reads import find_weight_reads
from spectr.composition.model_naming import naming_of
from spectr.errors import CompositionError, DataError
from spectr.hashing import json_sha256, known_sha256
from spectr.layers import make_plan, swap_module
from spectr.layers.base_layers import ModelLayers
from spectr.layers.linear_layers import placement
from spectr.layers.model_state import restored
from spectr.layers.multi_routed import COMPOSED
from spectr.routers import Oracle
from spectr.tasks import Example
from spectr.training.data import encode, longest, shares_prefix
from spectr.training.fit import Progress, fit, fresh_facts, read_facts, trainable
from spectr.training.training_settings import GateSettings


class GatedLinear(nn.Module):
    """``W x + b + sigmoid(v . x) u(x)`` with an expert's update ``u``; only ``v`` is trained, starting at zero.

    Args:
        base: The layer ``W x + b``.
        update: The expert's update, frozen.
        device: Device of the computation.
        dtype: Dtype of the layer; the gate itself is float32.

    Source: PHATGOOSE (Muqeeth et al., 2024), section 3.
    """

    A_RI: Tensor
    B_OR: Tensor
    gain_O: Tensor | None
    shift_O: Tensor | None

    def __init__(self, base: nn.Module, update: Update, device: torch.device, dtype: torch.dtype):
        super().__init__()
        self.base, factors = base, update.factors
        self.register_buffer("A_RI", factors.A.to(device, dtype), persistent=False)
        self.register_buffer("B_OR", (factors.B.float() * factors.scale).to(device, dtype), persistent=False)
        for name, vector_O in (("gain_O", update.gain_O), ("shift_O", update.shift_O)):
            self.register_buffer(name, None if vector_O is None else vector_O.to(device, dtype), persistent=False)
        self.gate = nn.Parameter(torch.zeros(factors.A.shape[1], device=device, dtype=torch.float32))

    @property
    def weight(self) -> Tensor:
        """The base layer's weight: some models ask for its dtype."""
        return self.base.weight  # pyright: ignore[reportReturnType]

    def forward(self, input: Float[Tensor, "*T I"]) -> Float[Tensor, "*T O"]:
        """The base layer's output plus the gated update."""
        x = input.to(self.A_RI.dtype)
        open_T1 = torch.sigmoid(x.float() @ self.gate)[..., None]
        out = self.base(input)
        return out + (open_T1.to(x.dtype) * self._update(x, out)).to(out.dtype)

    def _update(self, x: Tensor, out: Tensor) -> Tensor:
        update_TO = linear(linear(x, self.A_RI), self.B_OR)
        if self.gain_O is not None:
            bias = getattr(self.base, "bias", None)
            update_TO = update_TO + self.gain_O * (out if bias is None else out - bias).to(x.dtype)
        return update_TO if self.shift_O is None else update_TO + self.shift_O


def train_gates(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    expert: Expert,
    *,
    train: Sequence[Example],
    settings: GateSettings,
    work: str | Path,
    data: dict[str, Any] | None = None,
    checkpoint_seconds: float = 60.0,
    progress: Progress = lambda *_: None,
) -> tuple[dict[str, Float[Tensor, " I"]], dict[str, Any]]:
    """Train an expert's gates on its own data and loss. An interrupted run resumes.

    Args:
        model: The base model, decoder-only or with an encoder and a decoder; unchanged afterwards.
        tokenizer: Its tokenizer.
        expert: A finished expert, frozen here.
        train: Its training examples.
        settings: See :class:`GateSettings`.
        work: Folder for the checkpoint; emptied at the end by :func:`forget`.
        data: Origin of the examples; for the record, and to identify this run.
        checkpoint_seconds: Time between checkpoints.
        progress: Called with (phase, done, total, remark).

    Returns:
        The gates by module, float32, (inputs,); and a record of the training.

    Raises:
        DataError: There are no examples, or ``work`` holds the checkpoint of another run.
        CompositionError: The expert does not fit the model.
    """
    expert.check_factors_alone("a gate", CompositionError)
    if not train:
        raise DataError("there are no training examples", do="check the data file")
    encoded = encode(tokenizer, train, longest(model, settings), share=shares_prefix(model))
    content = [encoded.prefix, encoded.prompts, encoded.answers, known_sha256(expert.weights), asdict(settings), data]
    content.append(str(model.dtype))
    fingerprint = json_sha256(content)
    checkpoint = checkpoint_of(work)
    facts = read_facts(checkpoint, fingerprint) or fresh_facts(fingerprint)
    named = named_for(expert, naming_of(model))
    named.check_factors_alone("a gate", CompositionError)
    with _gated(model, named):
        facts = fit(
            model,
            encoded,
            settings,
            settings.steps,
            facts,
            checkpoint,
            checkpoint_seconds,
            progress,
            accumulation=settings.accumulation,
        )
        trained = {name.removesuffix(".gate"): gate.detach().clone() for name, gate in trainable(model).items()}
    unused = {
        name: torch.zeros(shape.inputs, dtype=torch.float32)
        for name, shape in named.shapes.items()
        if name not in trained
    }
    gates = {named.file_names.get(name, name): gate for name, gate in {**unused, **trained}.items()}
    made = {
        "settings": asdict(settings),
        "data": data or {},
        "examples": len(train),
        "passes": round(settings.passes(len(train)), 2),
        "expert_sha256": known_sha256(expert.weights),
        "last_loss": facts["loss"],
        "seconds": round(facts["seconds"], 1),
    }
    return gates, made


def checkpoint_of(work: str | Path) -> Path:
    """The checkpoint in this folder."""
    return Path(work) / "checkpoint.safetensors"


def forget(work: str | Path) -> None:
    """Delete a finished run's checkpoint, and its folder if it is then empty."""
    checkpoint_of(work).unlink(missing_ok=True)
    folder = Path(work)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def keep_gates(library: Path, expert: Expert, gates: dict[str, Any], facts: dict[str, Any]) -> None:
    """Write gates next to an expert: in a library through its entry, in a plain folder into the adapter's own."""
    from spectr.library import LibraryStore
    from spectr.library.manifest import MANIFEST_FILE

    if (library / MANIFEST_FILE).is_file():
        LibraryStore(library).add_gates(expert.name, gates, facts)
        return
    with replacing(expert.weights.parent / GATES_FILE) as scratch:
        write_gates(scratch, gates, facts)


@contextmanager
def _gated(model: nn.Module, expert: Expert) -> Iterator[None]:
    """The model with the expert behind gates, the only trained parameters; restored afterwards."""
    if any(isinstance(module, COMPOSED) for module in model.modules()):
        raise DataError("this model is composed", do="train gates on the base model: call remove() first")
    plan = make_plan(model, [expert], Oracle(expert=expert.name), uncalled=find_weight_reads(model).outside)
    originals = {name: model.get_submodule(name) for name in plan.modules}
    with restored(model):
        with expert.open_on(ModelLayers(model)) as read:
            for name, base in originals.items():
                swap_module(model, name, GatedLinear(base, read(name), *placement(base, model)))
        gates = {module.gate for module in model.modules() if isinstance(module, GatedLinear)}
        for parameter in set(model.parameters()) - gates:
            parameter.requires_grad_(False)
        yield
