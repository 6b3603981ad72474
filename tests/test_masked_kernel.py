"""The compiled decision of packed layers, against torch's: scores, weights, kept ones and few tokens' outputs."""

import pytest
import torch

from spectr.layers.kernels.masked import Masked, Part, add_rows, masked_works
from spectr.selection import TopK
from spectr.vllm.routing import weights_among

E, R, COLUMNS = 5, 3, torch.tensor([6, 0, 2, 3, 5])  # of seven experts in the masks
LENGTHS, TOKENS, WIDTH = (20, 7), 9, 27 + 2 * E * R


def numbers(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def judged(y, allowed, centers, Bt, select):
    """Scores, weights, products and outputs by torch, in float64 from the same numbers."""
    h_TSER = y[:, sum(LENGTHS) :].view(TOKENS, 2, E, R)
    scored = (h_TSER - centers.view(2, E, R)) if centers is not None else h_TSER
    scores_TSE = scored.float().norm(dim=-1)
    mask = allowed[:, COLUMNS][:, None].expand_as(scores_TSE)
    weights_TSE = weights_among(select, scores_TSE, mask)
    weighted = (h_TSER.float() * weights_TSE[..., None]).to(y.dtype).flatten(-2)
    parts = [weighted[:, s].double() @ Bt[s].double() for s in range(2)]
    return scores_TSE, weights_TSE, weighted, y[:, : sum(LENGTHS)].double() + torch.cat(parts, -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("select", [TopK(k=1), TopK(k=2, weighting="softmax", temperature=0.5), TopK(k=4)], ids=str)
def test_it_decides_as_torch_does(dtype, centred, select):
    assert masked_works(dtype)
    y = numbers(TOKENS, WIDTH, seed=1).to(dtype)
    Bt = [numbers(E * R, length, seed=2 + length).to(dtype) for length in LENGTHS]
    centers = numbers(2, E * R, seed=3).to(dtype) if centred else None
    allowed = numbers(TOKENS + 4, 7, seed=4) > 0  # a buffer with more rows than there are tokens
    allowed[0], allowed[1] = False, True
    parts = [Part(Bt[s], None if centers is None else centers[s], (0, LENGTHS[0])[s]) for s in range(2)]
    softmax = select.weighting == "softmax"
    masked = Masked(parts, COLUMNS, select.k, select.temperature if softmax else 0.0, sum(LENGTHS))
    scores, weights = (torch.full((3, 2, E), -1.0) for _ in range(2))
    weighted, out = y.new_empty(TOKENS * masked.rows), y.new_empty(TOKENS, sum(LENGTHS))
    sampled = torch.tensor([8, 0, 1])
    assert masked.decide(y, allowed, (sampled, scores, weights), weighted)
    assert masked.add(y, weighted, out)
    scores_TSE, weights_TSE, weighted_TSP, out_TO = judged(y, allowed[:TOKENS], centers, Bt, select)
    torch.testing.assert_close(scores, scores_TSE[sampled])
    torch.testing.assert_close(weights, weights_TSE[sampled])
    near = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}
    for module, told in enumerate(weighted.view(2, TOKENS, E * R)):
        torch.testing.assert_close(told, weighted_TSP[:, module], **near)
    torch.testing.assert_close(out.double(), out_TO, **near)
    assert torch.equal(out[0], y[0, : sum(LENGTHS)])  # nobody allowed: the base layer's own


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_adds_parts_of_wider_rows(dtype):
    y, added = numbers(4, 50, seed=1).to(dtype), numbers(4, 37, seed=2).to(dtype)
    out = torch.zeros(4, 60, dtype=dtype)
    add_rows(y[:, 3:40], added, out[:, 5:42])
    assert torch.equal(out[:, 5:42], y[:, 3:40] + added)
    assert not out[:, :5].any()
    assert not out[:, 42:].any()
