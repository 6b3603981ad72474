"""The experts of packed layers as one operation in C, against torch in float64: outputs, what is kept or replaced."""

from typing import NamedTuple

import pytest
import torch

from compiled import needs_a_compiler
from spectr.ops import reference_ops
from spectr.ops.cpu import has_unit
from spectr.ops.packed import Choosing, Module, Packed, TopKNumbers, packed_works
from spectr.selection import TopK

pytestmark = needs_a_compiler

E, COLUMNS = 5, torch.tensor([6, 0, 2, 3, 5])  # of seven experts in the masks
LENGTHS, TOKENS = (100, 7), 600
TWO = TopK(k=2)


class Way(NamedTuple):
    """What a layer is computed by: tiles or vectors, as its dtype, its inputs and the user say."""

    dtype: torch.dtype
    inputs: int
    unit: bool

    def __str__(self):
        return f"{self.dtype}, {self.inputs}, {'tiles' if self.unit else 'vectors'}".removeprefix("torch.")


UNITS = (True, False) if has_unit() else (False,)
WAYS = [Way(dtype, inputs, unit) for dtype in (torch.float32, torch.bfloat16) for inputs in (96, 37) for unit in UNITS]


@pytest.fixture(params=WAYS, ids=str)
def way(request, monkeypatch):
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "DEFAULT" if request.param.unit else "AVX512_CORE")
    return request.param


def numbers(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mask(allowed):
    return torch.where(allowed, 1.0, torch.nan)


class World:
    """A layer of two modules, and what torch says of it."""

    def __init__(self, way, rank, centred=True, select=TWO, requests=3, held=0, others=()):
        assert packed_works(way.dtype)
        self.way, self.rank = way, rank
        self.A, self.B = self.factors(1)
        self.selects = (select, *others)
        self.centers = numbers(2, len(self.selects), E * rank, seed=3).to(way.dtype) if centred else None
        self.scales = numbers(2, len(self.selects), E * rank, seed=11).abs() if others else None
        if self.scales is not None:
            self.scales[:, -1] = 0  # all alike
        self.routers = torch.arange(TOKENS, dtype=torch.int32) % 5 % len(self.selects)
        self.granted = mask(numbers(TOKENS, 7, seed=4) > 0)
        self.granted[0], self.granted[1] = torch.nan, 1
        self.sampled = torch.tensor([8, 0, 1])[:requests]
        self.scores, self.weights = (torch.full((requests, 2, E), -1.0) for _ in range(2))
        centers = [None, None] if self.centers is None else self.centers
        scales = [None, None] if self.scales is None else self.scales
        self.modules = [Module(*one) for one in zip(self.B, centers, (2, 102), scales, strict=True)]
        selects = [TopKNumbers(one.k, one.temperature if one.weighting == "softmax" else 0.0) for one in self.selects]
        kept = (self.sampled, self.scores, self.weights) if requests else None
        routers, most = self.routers if others else None, max(held, *(one.k for one in (*self.selects, TWO)))
        self.choosing = Choosing(COLUMNS, self.granted, selects, routers, most, kept)
        self.packed = Packed(self.A, self.modules, self.choosing)

    def factors(self, seed):
        A = numbers(2 * E * self.rank, self.way.inputs, seed=seed).to(self.way.dtype) / 8
        return A, [numbers(length, E * self.rank, seed=seed + length).to(self.way.dtype) for length in LENGTHS]

    def given(self, tokens):
        x, out = numbers(tokens, self.way.inputs, seed=5), numbers(tokens, 2 + sum(LENGTHS), seed=6)
        return x.to(self.way.dtype), out.to(self.way.dtype)

    def judged(self, x, out):
        centers = [None, None] if self.centers is None else self.centers
        modules = [
            module._replace(B_OP=B, centers_WP=row)
            for module, B, row in zip(self.modules, self.B, centers, strict=True)
        ]
        return reference_ops.add_packed(out, x, self.A, modules, self.choosing)

    def clear(self, scores_TSE):
        """Tokens whose choice rounding does not change: in bfloat16 ``A x`` and what is scored of it are rounded."""
        masked = scores_TSE.masked_fill(~(self.granted[: len(scores_TSE), COLUMNS][:, None] >= 0), 0)
        order = torch.cat([masked.sort(descending=True).values, torch.zeros(*masked.shape[:2], 1)], -1)
        k = torch.tensor([one.k for one in self.selects])[self.routers[: len(masked)].long()][:, None, None].expand(
            -1, 2, 1
        )
        margin = order.gather(-1, k - 1) - order.gather(-1, k)
        few = order.gather(-1, k) == 0
        near = 1e-4 if self.way.dtype == torch.float32 else 5e-2
        return (few | (margin > near))[..., 0].all(-1)

    def check(self, tokens, x=None, out=None):
        if x is None or out is None:
            x, out = self.given(tokens)
        scores, weights, wanted = self.judged(x, out)
        before, clear = out.clone(), self.clear(scores)
        assert clear.float().mean() > 0.6
        assert self.packed(out, x) is out
        exact = self.way.dtype == torch.float32
        near = {"rtol": 1e-5, "atol": 2e-5} if exact else {"rtol": 2e-2, "atol": 2e-1}  # A x and w A x are rounded, too
        torch.testing.assert_close(out[clear].double(), wanted[clear], **near)
        alone = self.granted[:tokens, COLUMNS].isnan().all(-1)
        assert torch.equal(out[alone], before[alone])  # the base layer's own
        assert torch.equal(out[:, :2], before[:, :2])  # of no module
        return scores, weights, clear


@pytest.mark.parametrize("select", [TopK(k=1), TopK(k=2, weighting="softmax", temperature=0.5), TopK(k=4)], ids=str)
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("rank", [3, 8, 16])
def test_it_answers_as_torch_does(way, rank, centred, select):
    world = World(way, rank, centred, select)
    near = 1e-4 if way.dtype == torch.float32 else 5e-2
    for tokens in (9, 16, 75, TOKENS):
        scores, weights, clear = world.check(tokens)
        torch.testing.assert_close(world.scores, scores[world.sampled], rtol=near, atol=near)
        sure = clear[world.sampled]
        torch.testing.assert_close(world.weights[sure], weights[world.sampled][sure], rtol=near, atol=near)


@pytest.mark.parametrize("tokens", [1, 2, 3, 4])
def test_few_tokens_are_answered_likewise(way, tokens):
    world = World(way, 8, requests=0)
    world.granted[0] = 1 if tokens % 2 else torch.nan
    world.check(tokens)


@pytest.mark.parametrize("select", [TWO, TopK(k=2, weighting="softmax", temperature=0.5)], ids=str)
@pytest.mark.parametrize("tokens", [2, 20, 75])
def test_scores_are_informed_and_weights_held_token_by_token(way, tokens, select):
    world = World(way, 8, select=select, held=3)
    world.granted *= numbers(TOKENS, 7, seed=9).abs()  # priors
    world.granted[8, 6] = 0
    held = torch.arange(TOKENS) % 3 == 1
    world.granted[held] = torch.nan
    world.granted[held, :4] = -numbers(TOKENS, 4, seed=10)[held].abs()  # more than are chosen, and one not adapting it
    world.sampled.copy_(torch.tensor([tokens - 1, 0, 1]))
    scores, weights, clear = world.check(tokens)
    assert (weights[clear & held[:tokens]] > 0).sum(-1).unique().tolist() == [3]
    near, sure = 1e-4 if way.dtype == torch.float32 else 5e-2, clear[world.sampled]
    torch.testing.assert_close(world.scores, scores[world.sampled], rtol=near, atol=near)
    torch.testing.assert_close(world.weights[sure], weights[world.sampled][sure], rtol=near, atol=near)


OTHERS = (TopK(k=1), TopK(k=3, weighting="softmax", temperature=0.5), TopK(k=E))


@pytest.mark.parametrize("tokens", [3, 20, 300])
def test_each_token_is_scored_and_chosen_for_in_its_own_way(way, tokens):
    world = World(way, 8, others=OTHERS)
    near = 1e-4 if way.dtype == torch.float32 else 5e-2
    world.sampled.copy_(torch.tensor([tokens - 1, 1, 2]))
    scores, weights, clear = world.check(tokens)
    sure = clear[world.sampled]
    torch.testing.assert_close(world.scores, scores[world.sampled], rtol=near, atol=near)
    torch.testing.assert_close(world.weights[sure], weights[world.sampled][sure], rtol=near, atol=near)
    world.routers.copy_(world.routers.flip(0))
    world.check(tokens)


def test_more_may_be_taken_than_there_are(way):
    World(way, 8, select=TopK(k=7)).packed(*reversed(World(way, 8).given(20)))
    world = World(way, 8, select=TopK(k=E))
    world.check(20)


def test_masks_and_factors_that_are_written_anew_count_from_the_next_call_on(way):
    world = World(way, 8)
    world.check(20)
    world.granted.copy_(mask(world.granted.isnan()))
    world.granted[1, 6] = 1
    world.check(20)
    world.A, world.B = world.factors(50)
    world.centers.mul_(2)
    world.packed.fill(world.A, world.B, world.centers)
    world.check(20)


def test_rows_may_be_parts_of_wider_ones(way):
    world = World(way, 8)
    x, out = numbers(20, 2 * way.inputs, seed=7).to(way.dtype), numbers(20, 150, seed=8).to(way.dtype)
    before = out.clone()
    world.check(20, x[:, way.inputs :], out[:, 4 : 6 + sum(LENGTHS)])
    assert torch.equal(out[:, 6 + sum(LENGTHS) :], before[:, 6 + sum(LENGTHS) :])


@pytest.mark.parametrize("tokens", [2, 20])
def test_an_expert_that_is_not_chosen_spoils_nothing(way, tokens):
    world = World(way, 8, requests=0)
    world.granted[:, 0] = torch.nan
    rows = slice(8, 16)  # of expert number 1, the engine's 0, in the first module
    world.A[rows] = torch.inf
    world.packed.fill(world.A, world.B, world.centers)
    x, out = world.given(tokens)
    world.packed(out, x)
    assert out.isfinite().all()


def test_the_operation_is_what_torch_asks_of_operations(way):
    world = World(way, 8)
    x, out = world.given(9)
    torch.library.opcheck(torch.ops.spectr.add_experts.default, (out, x.contiguous(), world.packed.at))
