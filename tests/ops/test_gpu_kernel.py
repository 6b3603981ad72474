"""The GPU's kernel: on a GPU where there is one, else under Triton's interpreter (tests/conftest.py)."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings, strategies as st
from test_kernels import INPUTS, TOLERANCE, clear, layer_of

from holding import holding
from models import close
from spectr import Calibrated, Spectr
from spectr.ops import Offer, Selector, backend_for, reference_ops

pytest.importorskip("triton", reason="Triton is for Linux")


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module")
def kernel():
    from spectr.ops.gpu import GpuBackend

    return GpuBackend(DEVICE)


def both(kernel, layer, x, prior=None):
    """The layer's output by the kernel, which has to be used, and by torch."""
    done = []

    class Watched(type(kernel)):
        def add_chosen(self, *args, **settings):
            done.append(super().add_chosen(*args, **settings))
            return done[-1]

    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr("spectr.ops.dispatch.backend_for", lambda device: Offer(Watched(DEVICE), "watched"))
        layer.prepare()
        with holding(layer, prior=prior):
            fused = layer(x)
        patch.setattr("spectr.ops.dispatch.backend_for", lambda device: Offer(None, "none"))
        layer.prepare()
        with holding(layer, prior=prior):
            plain = layer(x)
    assert done == [True], "the kernel was not used"
    return fused, plain


@settings(max_examples=25, deadline=None)
@given(
    experts=st.integers(1, 20),
    rank=st.integers(1, 9),
    top_k=st.integers(1, 6),
    tokens=st.sampled_from([(1,), (1, 1), (3, 1), (2, 4), (20,), (70,), (2, 40)]),
    dtype=st.sampled_from(list(TOLERANCE)),
    weights=st.sampled_from(["uniform", "softmax"]),
    seed=st.integers(0, 10_000),
)
def test_routing_is_that_of_torch(kernel, experts, rank, top_k, tokens, dtype, weights, seed):
    layer = layer_of(Spectr(top_k=top_k, weights=weights, temperature=2.0), experts, rank, dtype, seed).to(DEVICE)
    x = torch.randn(*tokens, INPUTS, generator=torch.Generator().manual_seed(seed + 1)).to(DEVICE, dtype)
    fused, plain = both(kernel, layer, x)
    if dtype == torch.float32 or clear(layer, x):
        close(fused.float(), plain.float(), TOLERANCE[dtype])


@pytest.mark.parametrize("rows", [1, 3])
def test_centers_and_a_prior_count(kernel, rows):
    layer = layer_of(Calibrated(level="prior", top_k=2, weights="softmax"), 7, 4, torch.float32, 0, centers=True).to(
        DEVICE
    )
    prior = torch.rand(rows, 7, generator=torch.Generator().manual_seed(1)).to(DEVICE) * 3
    x = torch.randn(3, 2, INPUTS, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    fused, plain = both(kernel, layer, x, prior)
    close(fused, plain, 1e-5)
    other, _ = both(kernel, layer, x)
    assert not torch.allclose(other, fused)


@pytest.mark.parametrize("temperature", [0.0, 2.0])
@pytest.mark.parametrize("rows", [0, 2])
def test_it_chooses_as_the_reference_does(kernel, rows, temperature):
    chance = torch.Generator().manual_seed(5)
    h, centers = torch.randn(6, 28, generator=chance), torch.randn(28, generator=chance)
    h[:, 4:8], centers[4:8] = h[:, :4], centers[:4]  # experts alike: the first is taken
    prior = torch.rand(rows, 7, generator=chance).index_fill(1, torch.tensor([0, 1]), 9.0) if rows else None
    for k in (1, 3):
        select = Selector(7, k, temperature)
        given = [None if tensor is None else tensor.to(DEVICE) for tensor in (h.clone(), centers, prior)]
        assert kernel.choose(*given, select)
        torch.testing.assert_close(given[0].cpu(), reference_ops.choose(h, centers, prior, select))


def test_all_that_calls_launch_is_launched_when_a_plan_is_made(kernel):
    launched = []

    class Watched(type(kernel)):
        def _run(self, kernel, grid, tensors, numbers, form):
            launched.append((kernel, form[6]))  # whether there is a prior

    A, Bt = torch.zeros(20, INPUTS, device=DEVICE), torch.zeros(20, 8, device=DEVICE)
    Watched(DEVICE).warm_up(A, Bt, None, Selector(5, 2, 0.0))
    assert len(set(launched)) == 4


@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")  # numpy, as the interpreter
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_so(kernel, value):
    layer = layer_of(Spectr(top_k=2), 5, 4, torch.float32, 0).to(DEVICE)
    x = torch.randn(2, INPUTS, device=DEVICE)
    x[0, 3] = value
    fused, plain = both(kernel, layer, x)
    assert not fused[0].isfinite().any()
    close(fused[1], plain[1], 1e-5)


def test_more_experts_than_a_program_holds_are_left_to_torch(kernel):
    layer = layer_of(Spectr(top_k=2), 1025, 9, torch.float32, 0).to(DEVICE)
    x = torch.randn(1, INPUTS, device=DEVICE)
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr("spectr.ops.dispatch.backend_for", lambda device: Offer(kernel, "Triton"))
        by_kernel = layer(x)
        patch.setattr("spectr.ops.dispatch.backend_for", lambda device: Offer(None, "none"))
        assert torch.equal(by_kernel, layer(x))


def test_a_machine_without_a_gpu_has_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert torch.cuda.device_count() > 0 or backend_for("cuda").backend is None
    assert backend_for("meta").backend is None


def test_it_compiles_for_a_gpu_that_is_not_here(tmp_path):
    """What the interpreter lets pass need not be what the compiler takes."""
    program = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from spectr.ops import gpu

form = dict(EXPERTS=9, RANK=6, K=4, E=16, R=8, CENTERED=True, INFORMED=True, SOFTMAX=True, T=16)
block = dict(OUTPUTS=200, BLOCK=64)
for number in ("fp32", "bf16", "fp16"):
    for kernel, factors, constants in ((gpu._add_chosen, ("Bt", "out"), form | block), (gpu._weigh, (), form)):
        signature = {name: f"*{number}" for name in ("h", "centers")} | {"prior": "*fp32"}
        signature |= {name: f"*{number}" for name in factors}
        signature |= {name: "i32" for name in ("tokens", "rows_of_prior")} | {"temperature": "fp32"}
        signature |= {name: "constexpr" for name in constants}
        source = ASTSource(kernel, signature, constexprs=constants)
        print(len(compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]))
"""
    alone = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.PIPE, env=alone, timeout=300)
    assert [int(line) > 1000 for line in done.stdout.split()] == [True] * 6
