"""The compiled functions for few tokens: what torch computes with more calls."""

from __future__ import annotations

import subprocess

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from compiled import needs_a_compiler
from holding import holding
from models import close
from spectr import Calibrated, Spectr
from spectr.flops import count_flops
from spectr.layers import RoutedLinear
from spectr.ops import Offer, backend_for, compiling, cpu, report_once
from spectr.ops.trials import Trials
from spectr.routers.calibrated import Centers
from spectr.spectral import Share, Stack

INPUTS, OUTPUTS = 24, 20
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def tiles_work():
    return "tiles" in backend_for("cpu").backend.ways(torch.float32, chooses=True)


class OtherLinear(nn.Linear):
    """A base layer that only its own call can be trusted with."""


def layer_of(router, experts, rank, dtype, seed, *, centers=False, inputs=INPUTS, base=nn.Linear):
    chance = torch.Generator().manual_seed(seed)
    parts = {
        f"e{number:02}": Share(
            torch.randn(rank, inputs, generator=chance),
            torch.randn(OUTPUTS, rank, generator=chance),
            own=Centers(torch.randn(rank, generator=chance)) if centers else (),
        ).to(torch.device("cpu"), dtype)
        for number in range(experts)
    }
    use = router.policy and router.policy.use
    return RoutedLinear(base(inputs, OUTPUTS).to(dtype), Stack.of(parts), router, use=use)


def both(monkeypatch, layer, x, tiles=True, **held):
    """The layer's output by the kernels, which have to be used (their tiles, too, if there are any), and by torch."""
    functions = {
        key: call for key, call in vars(backend_for("cpu").backend)["_functions"].items() if tiles or key[0] != "tiles"
    }
    calls = []

    class Counted(cpu.CpuBackend):
        def __init__(self):
            self._functions, self._trials = functions, Trials(self, "counted")

        def __getattribute__(self, name):
            if name in ("add_chosen", "add_weighted", "fused_linear"):
                calls.append(name)
            return super().__getattribute__(name)

    with torch.no_grad(), monkeypatch.context() as patch:
        patch.setattr("spectr.ops.dispatch.backend_for", lambda device: Offer(Counted(), "counted"))
        layer.prepare()
        with holding(layer, **held):
            fused = layer(x)
        patch.setattr("spectr.ops.dispatch.backend_for", lambda device: Offer(None, "none"))
        layer.prepare()
        with holding(layer, **held):
            plain = layer(x)
    assert calls, "the kernels were not used"
    return fused, plain


def clear(layer, x):
    """Whether no choice hangs on rounding: the k-th and the next score differ by more than it."""
    k = layer.select.k
    top = layer.scores(x).sort(-1, descending=True).values
    return k >= top.shape[-1] or bool((top[..., k - 1] - top[..., k] > 0.02 * top[..., k]).all())


@needs_a_compiler
@settings(max_examples=100, deadline=None)
@given(
    experts=st.integers(1, 20),
    rank=st.integers(1, 9),
    top_k=st.integers(1, 6),
    tokens=st.sampled_from([(1,), (1, 1), (3, 1), (2, 4), (16,), (17,), (40,), (3, 20), (270,)]),
    dtype=st.sampled_from(list(TOLERANCE)),
    weights=st.sampled_from(["uniform", "softmax"]),
    base=st.sampled_from([nn.Linear, OtherLinear]),
    tiles=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_routing_is_that_of_torch(experts, rank, top_k, tokens, dtype, weights, base, tiles, seed):
    router = Spectr(top_k=top_k, weights=weights, temperature=2.0)
    layer = layer_of(router, experts, rank, dtype, seed, base=base)
    x = torch.randn(*tokens, INPUTS, generator=torch.Generator().manual_seed(seed + 1)).to(dtype)
    with pytest.MonkeyPatch.context() as patch:
        fused, plain = both(patch, layer, x, tiles)
    if dtype == torch.float32 or clear(layer, x):
        close(fused.float(), plain.float(), TOLERANCE[dtype])


@needs_a_compiler
@pytest.mark.parametrize("tiles", [False, True])
@pytest.mark.parametrize("length", [2, 20, 90])
@pytest.mark.parametrize("rows", [1, 3])
def test_centers_and_a_prior_count(monkeypatch, rows, length, tiles):
    layer = layer_of(Calibrated(level="prior", top_k=2, weights="softmax"), 7, 4, torch.float32, 0, centers=True)
    prior = torch.rand(rows, 7, generator=torch.Generator().manual_seed(1)) * 3
    x = torch.randn(3, length, INPUTS, generator=torch.Generator().manual_seed(2))
    fused, plain = both(monkeypatch, layer, x, tiles, prior=prior)
    close(fused, plain, 1e-5)
    other, _ = both(monkeypatch, layer, x)
    assert not torch.allclose(other, fused)


@needs_a_compiler
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("base", [nn.Linear, OtherLinear])
def test_held_weights_are_those_of_torch(monkeypatch, dtype, rows, base):
    layer = layer_of(Spectr(top_k=2), 5, 4, dtype, 0, base=base)
    weights = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0], [1.0, 0, 0, 0, 0], [0, 0, 0, 0.25, 0.75]])[:rows]
    x = torch.randn(3, 2, INPUTS, generator=torch.Generator().manual_seed(2)).to(dtype)
    fused, plain = both(monkeypatch, layer, x, weights=weights)
    close(fused.float(), plain.float(), TOLERANCE[dtype])


@needs_a_compiler
def test_tokens_of_another_width_are_refused_as_the_base_layer_does():
    layer = layer_of(Spectr(top_k=2), 5, 4, torch.float32, 0)
    with torch.no_grad():
        layer(torch.randn(4, INPUTS))
        with pytest.raises(RuntimeError, match="cannot be multiplied"):
            layer(torch.randn(4, INPUTS // 2))  # as many numbers as two tokens


@needs_a_compiler
def test_a_cast_while_weights_are_fixed_is_seen():
    """The factors of a call keep their dtype when the model is cast: the kernels must not read them as another."""
    layer = layer_of(Spectr(top_k=2), 5, 4, torch.float32, 0)
    x = torch.randn(1, INPUTS, generator=torch.Generator().manual_seed(2))
    with torch.no_grad(), holding(layer, weights=torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]])):
        before = layer(x)
        close(layer.bfloat16()(x.bfloat16()).float(), before, 3e-2)


@needs_a_compiler
@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("tokens", [1, 3, 7, 16, 17, 32, 300])
@pytest.mark.parametrize("inputs", [INPUTS, 37, 5])
def test_the_whole_layer_in_one_call(held, dtype, tokens, inputs):
    layer = layer_of(Spectr(top_k=2), 5, 4, dtype, 0, inputs=inputs)
    weights = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]]) if held else None
    x = torch.randn(tokens, inputs, generator=torch.Generator().manual_seed(2)).to(dtype)
    with torch.no_grad(), holding(layer, weights=weights):
        call = layer.in_force()
        if held and tokens > 31 and not tiles_work():
            assert layer._whole(x, call) is None
            return
        for bias in (layer.base.bias, None):
            layer.base.bias = bias
            whole = layer._whole(x, call)
            layer.base.register_forward_hook(lambda *_: None)
            assert layer._whole(x, call) is None
            close(whole.float(), layer(x).float(), TOLERANCE[dtype])
            layer.base._forward_hooks.clear()


@needs_a_compiler
@pytest.mark.parametrize("held", [False, True])
def test_many_tokens_are_as_exact_as_float32(monkeypatch, held):
    """Whatever the machine multiplies with: no further from float64 than torch's own float32."""
    layer = layer_of(Spectr(top_k=5), 5, 8, torch.float32, 0, inputs=700)
    x = torch.randn(300, 700, generator=torch.Generator().manual_seed(3))
    weights = torch.tensor([0.1, 0.2, 0.0, 0.3, 0.4]) if held else torch.full((5,), 0.2)
    fused, plain = both(monkeypatch, layer, x, weights=weights[None] if held else None)
    with torch.no_grad():
        shares = (x.double() @ layer.A_PI.double().mT) * weights.double().repeat_interleave(8)
        exact = shares @ layer.B_OP.double().mT + layer.base.double()(x.double())
    ours, theirs = ((found - exact).pow(2).mean().sqrt() for found in (fused, plain))
    assert ours < 1.2 * theirs


@needs_a_compiler
def test_torch_may_be_set_to_less_exact_products(monkeypatch):
    """torch.set_float32_matmul_precision: of "high" it says about 16 bits, where there is a fast way to it."""
    layer = layer_of(Spectr(top_k=5), 5, 8, torch.float32, 0, inputs=700)
    x = torch.randn(40, 700, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        highest = layer(x)
        before = torch.get_float32_matmul_precision()
        try:
            torch.set_float32_matmul_precision("high")
            high = layer(x)
        finally:
            torch.set_float32_matmul_precision(before)
    close(high, highest, 1e-4)
    assert torch.equal(high, highest) == (not tiles_work())


@needs_a_compiler
def test_the_whole_layer_reads_the_weight_that_is_there():
    layer = layer_of(Spectr(top_k=2), 5, 4, torch.float32, 0)
    x = torch.randn(1, INPUTS, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        delta = layer(x) - layer.base(x)
        for change in (
            lambda: layer.base.weight.mul_(2),
            lambda: setattr(layer.base, "weight", nn.Parameter(torch.randn(OUTPUTS, INPUTS))),
            lambda: setattr(layer.base.weight, "data", torch.randn(OUTPUTS, INPUTS)),
            lambda: setattr(layer.base, "forward", lambda x: torch.ones(1, OUTPUTS)),  # as accelerate does
        ):
            change()
            close(layer(x), layer.base(x) + delta, 1e-5)


@needs_a_compiler
@pytest.mark.parametrize("weight", [torch.randn(INPUTS, OUTPUTS).mT, torch.randn(OUTPUTS, INPUTS).bfloat16()])
def test_the_whole_layer_takes_no_weight_that_it_cannot_read(weight):
    layer = layer_of(Spectr(top_k=2), 5, 4, torch.float32, 0)
    with torch.no_grad():
        assert layer._whole(torch.randn(1, INPUTS), layer.call) is not None
        layer.base.weight = nn.Parameter(weight)
        assert layer._whole(torch.randn(1, INPUTS), layer.call) is None
        layer.base.weight = nn.Parameter(torch.empty(OUTPUTS, INPUTS, device="meta"))
        assert layer._whole(torch.randn(1, INPUTS), layer.call) is None  # accelerate keeps it elsewhere between calls


@needs_a_compiler
def test_factors_elsewhere_are_not_taken():
    with torch.no_grad():
        x = torch.randn(2, INPUTS)
        assert not backend_for("cpu").backend.take(x, torch.zeros(4, INPUTS, device="meta"))
        assert not backend_for("cpu").backend.take(x, torch.zeros(4, INPUTS, dtype=torch.bfloat16))


@needs_a_compiler
def test_ties_go_to_one_of_the_tied(monkeypatch):
    """Two equal experts: whichever is taken, the output is the same."""
    layer = layer_of(Spectr(top_k=1), 2, 3, torch.float32, 0)
    layer.A_PI[3:] = layer.A_PI[:3]
    layer.B_OP[:, 3:] = layer.B_OP[:, :3]
    fused, plain = both(monkeypatch, layer, torch.randn(1, INPUTS))
    close(fused, plain, 1e-5)


@needs_a_compiler
def test_what_is_not_finite_stays_so(monkeypatch):
    layer = layer_of(Spectr(top_k=2), 5, 4, torch.float32, 0)
    for value in (torch.nan, torch.inf):
        x = torch.randn(2, INPUTS)
        x[0, 3] = value
        fused, plain = both(monkeypatch, layer, x)
        assert not fused[0].isfinite().any()
        close(fused[1], plain[1], 1e-5)


@needs_a_compiler
@torch.no_grad()
@pytest.mark.parametrize(
    "x",
    [torch.randn(2, INPUTS, dtype=torch.float64), torch.randn(INPUTS, 2).mT, torch.randn(0, INPUTS)],
    ids=["another dtype", "not contiguous", "none"],
)
def test_what_they_cannot_do_they_do_not_take(x):
    assert not backend_for("cpu").backend.take(x)
    assert backend_for("cpu").backend.take(torch.randn(2, INPUTS))


@needs_a_compiler
def test_gradients_and_counters_see_single_operations():
    layer = layer_of(Spectr(top_k=2), 5, 4, torch.float32, 0)
    x = torch.randn(1, INPUTS, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    with torch.no_grad():
        assert count_flops(lambda: layer(x)) > 2 * INPUTS * (OUTPUTS + 5 * 4)


@needs_a_compiler
def test_a_hook_on_the_base_layer_sees_its_own_output():
    layer = layer_of(Spectr(top_k=2), 5, 4, torch.float32, 0)
    seen = []
    layer.base.register_forward_hook(lambda module, args, out: seen.append(out))
    x = torch.randn(1, INPUTS)
    with torch.no_grad():
        layer(x)
    close(seen[0], nn.functional.linear(x, layer.base.weight, layer.base.bias), 1e-6)


# Compiling


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    monkeypatch.setenv("SPECTR_CACHE", str(tmp_path))
    monkeypatch.delenv("SPECTR_KERNELS", raising=False)
    backend_for.cache_clear()
    yield tmp_path / "kernels"
    backend_for.cache_clear()


@needs_a_compiler
def test_they_are_compiled_once(fresh, monkeypatch):
    assert backend_for("cpu").backend is not None
    [made] = fresh.iterdir()
    backend_for.cache_clear()
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("compiled again"))
    assert backend_for("cpu").backend is not None
    assert list(fresh.iterdir()) == [made]


def test_without_a_compiler_torch_does_it_and_that_is_logged_once(fresh, monkeypatch, caplog):
    monkeypatch.setattr(compiling.shutil, "which", lambda _: None)
    report_once.cache_clear()
    layers = [layer_of(Spectr(top_k=2), 5, 4, torch.float32, 0) for _ in range(2)]
    with torch.no_grad():
        assert all(layer(torch.randn(1, INPUTS)).isfinite().all() for layer in layers)
    assert layers[0].factors.plan.summary == "torch: there is no C compiler"
    [record] = caplog.records
    assert record.levelname == "WARNING"


def test_a_compiler_that_fails_is_no_error(fresh, monkeypatch):
    monkeypatch.setattr(compiling.shutil, "which", lambda _: "/bin/false")
    assert backend_for("cpu").backend is None
    assert not list(fresh.glob("*.so"))


@pytest.mark.parametrize(
    ("said", "ours"), [("", True), ("default", True), ("avx512_core_amx", True), ("AVX512_CORE", False)]
)
def test_the_matrix_unit_is_ours_where_it_is_torchs(monkeypatch, said, ours):
    monkeypatch.setattr(cpu, "machine", lambda: "x86_64 flags: amx_bf16 amx_tile")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", said)
    assert cpu.has_unit() == ours


def test_they_can_be_switched_off(fresh, monkeypatch):
    monkeypatch.setenv("SPECTR_KERNELS", "0")
    assert backend_for("cpu").backend is None
    assert not fresh.exists()
