"""The experts of packed layers on the matrix unit, against torch in float64: outputs, and what is kept or replaced."""

import pytest
import torch

from spectr.layers.kernels.cpu import find_compiler, has_unit
from spectr.layers.kernels.tiles import Choosing, Module, Tiles, tiles_work
from spectr.selection import TopK
from spectr.vllm.routing import weights_among

# Where there are both, a source that does not compile is a failure, not a reason to skip.
needed = has_unit(torch.bfloat16) and find_compiler() is not None
pytestmark = pytest.mark.skipif(not needed, reason="this machine has no matrix unit for bfloat16, or no compiler")

E, COLUMNS = 5, torch.tensor([6, 0, 2, 3, 5])  # of seven experts in the masks
LENGTHS, INPUTS = (100, 7), 96
TWO = TopK(k=2)


def numbers(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class World:
    """A layer of two modules, and what torch says of it."""

    def __init__(self, rank, centred=True, select=TWO, requests=3):
        self.rank, self.select = rank, select
        self.A, self.B = self.factors(1)
        self.centers = numbers(2, E * rank, seed=3) if centred else None
        self.allowed = numbers(90, 7, seed=4) > 0
        self.allowed[0], self.allowed[1] = False, True
        self.sampled = torch.tensor([8, 0, 1])[:requests]
        self.scores, self.weights = (torch.full((requests, 2, E), -1.0) for _ in range(2))
        centers = [None, None] if self.centers is None else self.centers
        modules = [Module(*one) for one in zip(self.B, centers, (2, 102), strict=True)]
        temperature = select.temperature if select.weighting == "softmax" else 0.0
        kept = (self.sampled, self.scores, self.weights) if requests else None
        self.tiles = Tiles(self.A, modules, Choosing(COLUMNS, self.allowed, select.k, temperature, kept))

    def factors(self, seed):
        assert tiles_work()
        A = numbers(2 * E * self.rank, INPUTS, seed=seed).bfloat16() / 8
        return A, [numbers(length, E * self.rank, seed=seed + length).bfloat16() for length in LENGTHS]

    def judged(self, x, out):
        tokens = len(x)
        h_TSER = (x.double() @ self.A.double().mT).view(tokens, 2, E, self.rank)
        scored = h_TSER if self.centers is None else h_TSER - self.centers.view(2, E, self.rank)
        scores_TSE = scored.norm(dim=-1).float()
        mask = self.allowed[:tokens, COLUMNS][:, None].expand_as(scores_TSE)
        weights_TSE = weights_among(self.select, scores_TSE, mask)
        weighted = (h_TSER * weights_TSE[..., None]).flatten(-2)
        added = [weighted[:, s] @ self.B[s].double().mT for s in range(2)]
        whole = torch.cat([torch.zeros(tokens, 2, dtype=torch.float64), *added], -1)
        return scores_TSE, weights_TSE, out.double() + whole

    def check(self, tokens, x=None, out=None):
        x = numbers(tokens, INPUTS, seed=5).bfloat16() if x is None else x
        out = numbers(tokens, 2 + sum(LENGTHS), seed=6).bfloat16() if out is None else out
        scores, weights, wanted = self.judged(x, out)
        before = out.clone()
        assert self.tiles(out, x) is out
        near = {"rtol": 1e-2, "atol": 8e-2}  # w A x is bfloat16 before the last product
        torch.testing.assert_close(out.double(), wanted, **near)
        alone = ~self.allowed[:tokens].any(-1)
        assert torch.equal(out[alone], before[alone])  # the base layer's own
        assert torch.equal(out[:, :2], before[:, :2])  # of no module
        return scores, weights


@pytest.mark.parametrize("select", [TopK(k=1), TopK(k=2, weighting="softmax", temperature=0.5), TopK(k=4)], ids=str)
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("rank", [3, 8, 16])
def test_it_answers_as_torch_does(rank, centred, select):
    world = World(rank, centred, select)
    for tokens in (9, 16, 75):
        scores, weights = world.check(tokens)
        torch.testing.assert_close(world.scores, scores[world.sampled], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(world.weights, weights[world.sampled], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("tokens", [1, 2, 3, 4])
def test_few_tokens_are_answered_likewise(tokens):
    world = World(8, requests=0)
    world.allowed[0] = tokens % 2 == 1
    world.check(tokens)


def test_masks_and_factors_that_are_written_anew_count_from_the_next_call_on():
    world = World(8)
    world.check(20)
    world.allowed[1:] = ~world.allowed[1:]
    world.allowed[1, 6] = True
    world.check(20)
    world.A, world.B = world.factors(50)
    world.centers.mul_(2)
    world.tiles.fill(world.A, world.B, world.centers)
    world.check(20)


def test_rows_may_be_parts_of_wider_ones():
    world = World(8)
    x, out = numbers(20, 2 * INPUTS, seed=7).bfloat16(), numbers(20, 150, seed=8).bfloat16()
    before = out.clone()
    world.check(20, x[:, INPUTS:], out[:, 4 : 6 + sum(LENGTHS)])
    assert torch.equal(out[:, 6 + sum(LENGTHS) :], before[:, 6 + sum(LENGTHS) :])


def test_an_expert_that_is_not_chosen_spoils_nothing():
    world = World(8, requests=0)
    world.allowed[:, 0] = False
    rows = slice(8, 16)  # of expert number 1, the engine's 0, in the first module
    world.A[rows] = torch.inf
    world.tiles.fill(world.A, world.B, world.centers)
    out = numbers(20, 109, seed=6).bfloat16()
    world.tiles(out, numbers(20, INPUTS, seed=5).bfloat16())
    assert out.isfinite().all()
