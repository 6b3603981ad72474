"""Similarity of experts, pairwise, by task and over depth: cosines of their updates, and of the factors themselves."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack

import torch
from jaxtyping import Float
from torch import Tensor

from spectr.adapters import Factors
from spectr.errors import DataError
from spectr.evaluation.experiments.setup import ExperimentSetup, Result
from spectr.library import ExpertLibrary

_BLOCK = re.compile(r"\.(\d+)\.")


def similarity(setup: ExperimentSetup) -> Result:
    """Cosine between the experts' updates, averaged over layers, by expert, and by transformer block and kind of layer.

    And the cosine of the adapters' own factors, the other way to read the paper. Only that one sees that experts began
    from the same initial ``A``.

    Source: SpectR, Figures 2, 3 and 7.
    """
    by_module = cosines(setup.library, lambda done, total: setup.progress("similarity", done, total, ""))
    mean_EE = mean_cosines(by_module)
    raw_EE = mean_cosines(cosines(setup.library, products=raw_products))
    names = setup.library.names
    off = ~torch.eye(len(names), dtype=torch.bool)
    others_E, raw_others_E = mean_with_others(mean_EE), mean_with_others(raw_EE)
    kinds: dict[str, dict[int, list[float]]] = {}
    for module, table_EE in by_module.items():
        block = _BLOCK.search(module)
        values = table_EE[off]
        kinds.setdefault(module.rpartition(".")[2], {}).setdefault(int(block[1]) if block else -1, []).append(
            float(values.nanmean())
        )
    rows = [
        [name, f"{float(mean):.4f}", f"{float(raw):.4f}", *(f"{value:.3f}" for value in row)]
        for name, mean, raw, row in zip(names, others_E, raw_others_E, mean_EE.tolist(), strict=True)
    ]
    return Result(
        name="similarity",
        title="Similarity of the experts",
        source="SpectR, Figures 2, 3 and 7",
        columns=["expert", "mean with the others", "of the factors", *names],
        rows=rows,
        data={
            "experts": list(names),
            "mean": mean_EE.tolist(),
            "factors": raw_EE.tolist(),
            "by_expert": others_E.tolist(),
            "factors_by_expert": raw_others_E.tolist(),
            "by_kind": {
                kind: {str(block): sum(values) / len(values) for block, values in sorted(blocks.items())}
                for kind, blocks in kinds.items()
            },
        },
        notes=[
            "Cosine of the updates c B A as vectors, mean over the modules that both experts adapt. Computed from the "
            "factors.",
            f"Mean over all pairs: {float(mean_EE[off].nanmean()):.4f}; of the factors "
            f"{float(raw_EE[off].nanmean()):.4f}. Of the factors: cosine of A and B as the adapters' files have them, "
            "as one vector; between experts of unequal ranks there is none.",
        ],
        origin=setup.origin(),
    )


def inner_products(factors: Sequence[Factors]) -> Float[Tensor, "E E"]:
    """``<delta_s, delta_t> = c_s c_t tr(A_s^T B_s^T B_t A_t) = c_s c_t sum((B_s^T B_t) * (A_s A_t^T))``, float64.

    Args:
        factors: ``A`` (R, I), ``B`` (O, R) and scale of each expert at one module; ranks may differ.
    """
    count = len(factors)
    found = torch.zeros(count, count, dtype=torch.float64)
    for s, (A_s, B_s, c_s) in enumerate(factors):
        for t, (A_t, B_t, c_t) in enumerate(factors[: s + 1]):
            value = c_s * c_t * ((B_s.double().mT @ B_t.double()) * (A_s.double() @ A_t.double().mT)).sum()
            found[s, t] = found[t, s] = value
    return found


def raw_products(factors: Sequence[Factors]) -> Float[Tensor, "E E"]:
    """``<A_s, A_t> + <B_s, B_t>``, float64: of an adapter's numbers as one vector; NaN where ranks differ."""
    count = len(factors)
    found = torch.full((count, count), float("nan"), dtype=torch.float64)
    for s, (A_s, B_s, _) in enumerate(factors):
        for t, (A_t, B_t, _) in enumerate(factors[: s + 1]):
            if A_s.shape == A_t.shape:
                value = (A_s.double() * A_t.double()).sum() + (B_s.double() * B_t.double()).sum()
                found[s, t] = found[t, s] = value
    return found


def mean_with_others(table_EE: Float[Tensor, "E E"]) -> Float[Tensor, " E"]:
    """Of each expert the mean over all others; NaN where none is comparable."""
    same = torch.eye(len(table_EE), dtype=torch.bool)
    return table_EE.masked_fill(same, float("nan")).nanmean(1)


def cosines(
    library: ExpertLibrary,
    progress: Callable[[int, int], None] = lambda *_: None,
    *,
    products: Callable[[Sequence[Factors]], Tensor] = inner_products,
) -> Mapping[str, Float[Tensor, "E E"]]:
    """By module the cosines between all experts' updates, (experts, experts), NaN where one does not adapt it.

    Args:
        library: The experts.
        progress: Receives (done, total).
        products: Gives inner products, for the cosines; by default those of the updates.

    Source: SpectR, Figures 2, 3 and 7.

    Raises:
        DataError: The library has fewer than two experts.
    """
    names = library.names
    if len(names) < 2:
        raise DataError(f"similarity needs at least two experts, but {library.origin} has {len(names)}")
    experts = {name: library[name] for name in names}
    for expert in experts.values():
        expert.check_factors_alone("similarity", DataError)
    modules = sorted({module for expert in experts.values() for module in expert.shapes}, key=_by_layer)
    found = {}
    with ExitStack() as files:
        readers = {name: files.enter_context(expert.open()) for name, expert in experts.items()}
        for done, module in enumerate(modules, start=1):
            users = [i for i, name in enumerate(names) if module in experts[name].shapes]
            gram = products([readers[names[i]](module) for i in users])
            length = gram.diagonal().sqrt()
            full = torch.full((len(names), len(names)), float("nan"), dtype=torch.float64)
            full[torch.tensor(users)[:, None], torch.tensor(users)] = gram / (length[:, None] * length)
            found[module] = full
            progress(done, len(modules))
    return found


def mean_cosines(by_module: Mapping[str, Tensor]) -> Float[Tensor, "E E"]:
    """The mean over the modules that both experts adapt."""
    return torch.stack(list(by_module.values())).nanmean(0)


def _by_layer(module: str) -> list[tuple[int, int | str]]:
    return [(0, int(part)) if part.isdigit() else (1, part) for part in module.split(".")]
