"""Each router's ``init_expert``, ``stack`` and ``scores`` against the reference, with nothing of the layers loaded.

Run as a script, it refuses every import of ``spectr.layers`` and ``spectr.ops`` first.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    sys.modules |= dict.fromkeys(("spectr.layers", "spectr.ops"))  # None: importing them raises

import torch

from spectr.routers import (
    Arrow,
    Calibrated,
    Glider,
    Lag,
    Oracle,
    Phatgoose,
    Seqr,
    SeqrNormalised,
    Shortlist,
    Spectr,
    Uniform,
)
from spectr.spectral import AlignedExpert, SideData, reference

INPUTS, OUTPUTS, TOKENS, SCALE = 24, 16, 8, 1.5
EQUAL = dict.fromkeys("abcde", 4)
UNEQUAL = {"a": 1, "b": 4, "c": 16, "d": 2, "e": 3}
SHARED = dict.fromkeys("vwxyz", 5)  # one input factor
ALLOWED = [True, False, True, True, False]
chance = torch.Generator().manual_seed(5)
TEXTS, X_TI = (torch.randn(count, INPUTS, generator=chance) for count in (30, TOKENS))
LIBRARIES = {
    name: {
        expert: (torch.randn(rank, INPUTS, generator=chance), torch.randn(OUTPUTS, rank, generator=chance))
        for expert, rank in ranks.items()
    }
    for name, ranks in {"equal": EQUAL, "unequal": UNEQUAL, "shared": SHARED}.items()
}
LIBRARIES["shared"] = {name: (LIBRARIES["shared"]["v"][0], B) for name, (_, B) in LIBRARIES["shared"].items()}
GATES = {name: torch.randn(INPUTS, generator=chance) for name in {**EQUAL, **SHARED}}


def delta_of(A, B):
    return SCALE * B.double() @ A.double()


def spectral(deltas, x, ranks):
    return [reference.spectral_score(delta, x, rank) for delta, rank in zip(deltas.values(), ranks, strict=True)]


def calibrated(deltas, x, ranks):
    return [reference.calibrated_score(delta, x, list(TEXTS.double())) for delta in deltas.values()]


def normalised(deltas, x, ranks):
    return [reference.normalised_score(delta, x, list(TEXTS.double())) for delta in deltas.values()]


def gates(deltas, x, ranks):
    return [reference.gate_score(GATES[name].double(), x) for name in deltas]


METHODS = {
    Spectr(): spectral,
    Spectr(score="projection"): lambda deltas, x, ranks: [
        reference.projection_score(delta, x, rank) for delta, rank in zip(deltas.values(), ranks, strict=True)
    ],
    Seqr(): spectral,
    SeqrNormalised(): normalised,
    Arrow(): lambda deltas, x, ranks: [reference.arrow_score(delta, x) for delta in deltas.values()],
    Lag(shortlist=2): lambda deltas, x, ranks: reference.shortlisted(list(deltas.values()), x, 2, list(ranks)),
    Calibrated(): calibrated,
    Phatgoose(): gates,
    Glider(): gates,
    Glider(token_router=Spectr()): spectral,
    Glider(token_router=None): lambda deltas, x, ranks: [0.0] * len(deltas),
    Shortlist(token_router=Spectr()): spectral,
    Shortlist(): calibrated,
    Uniform(): lambda deltas, x, ranks: [1.0] * len(deltas),
}


def state_of(router, library):
    mean_I = TEXTS.mean(0)
    shares = {}
    for name, (A, B) in library.items():
        squares = [float((delta_of(A, B) @ (y - mean_I).double()).norm()) ** 2 for y in TEXTS]
        sizes = torch.tensor([(delta_of(A, B) @ y.double()).norm() for y in TEXTS])
        norm = float(sizes.mean()), float(sizes.std(correction=0))
        side = SideData(mean_I, (sum(squares) / len(squares)) ** 0.5, GATES[name], norm)
        shares[name] = router.init_expert(AlignedExpert.of(A, B, SCALE), side)
    return router.stack(shares)


def check(router, kind):
    library = LIBRARIES[kind]
    state = state_of(router, library)
    scores_TE = router.scores(state, X_TI, router.inputs(state, X_TI), None)
    deltas = {name: delta_of(A, B) for name, (A, B) in library.items()}
    ranks = [min(len(A), OUTPUTS) for A, _ in library.values()]
    expected = torch.tensor([METHODS[router](deltas, x, ranks) for x in X_TI.double()])
    torch.testing.assert_close(scores_TE, expected.float(), rtol=1e-4, atol=1e-4)
    whole = state.A_PI if state.mix_PR is None else state.mix_PR @ state.A_PI
    B_OP = torch.cat(list(deltas.values()), dim=1)
    updates = [b @ a for a, b in zip(whole.split(state.ranks), state.B_OP.split(state.ranks, dim=1), strict=True)]
    torch.testing.assert_close(torch.cat(updates, dim=1), B_OP.float(), rtol=1e-4, atol=1e-4)


def check_lag_among_the_allowed(kind):
    library, router = LIBRARIES[kind], Lag(shortlist=2)
    state = state_of(router, library)
    scores_TE = router.scores(state, X_TI, router.inputs(state, X_TI), torch.tensor(ALLOWED)[None])
    some = {name: factors for (name, factors), there in zip(library.items(), ALLOWED, strict=True) if there}
    few = state_of(router, some)
    expected_TE = torch.full_like(scores_TE, -torch.inf)
    expected_TE[:, ALLOWED] = router.scores(few, X_TI, router.inputs(few, X_TI), None)
    torch.testing.assert_close(scores_TE, expected_TE, rtol=1e-4, atol=1e-4)


def check_the_oracle(kind):
    library = LIBRARIES[kind]
    name = sorted(library)[2]
    state = state_of(Oracle(expert=name), library)
    assert state.experts == (name,)
    torch.testing.assert_close(state.B_OP @ state.A_PI, delta_of(*library[name]).float(), rtol=1e-4, atol=1e-4)


def check_all():
    for kind in LIBRARIES:
        for router in METHODS:
            check(router, kind)
        check_lag_among_the_allowed(kind)
        check_the_oracle(kind)
    assert state_of(Seqr(), LIBRARIES["shared"]).A_PI.shape == (5, INPUTS)
    assert state_of(SeqrNormalised(), LIBRARIES["shared"]).A_PI.shape == (5, INPUTS)


if __name__ == "__main__":
    check_all()
    assert sys.modules["spectr.layers"] is None
