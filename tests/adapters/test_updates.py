"""Updates that are more than two factors: DoRA and biases, against closed forms, and what is wrong with them."""

import pytest
import torch

from adapters_on_disk import assert_says, factors, key_A, key_B, write_adapter
from spectr.adapters import Factors, read_adapter
from spectr.adapters.updates import row_norms
from spectr.errors import AdapterError
from spectr.library import LibraryStore

Q, V = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"
DORA = {"use_dora": True}


class Layers:
    """Base layers with these weights and biases."""

    def __init__(self, weights, biases=None):
        self._weights, self._biases = weights, biases or {}

    def weight(self, module):
        return self._weights[module]

    def bias(self, module):
        return self._biases.get(module)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


BASE = Layers({Q: random(8, 8, seed=1), V: random(4, 8, seed=2)}, {Q: random(8, seed=3)})


def with_vectors(**vectors):
    """Factors of both modules, and vectors of ones, by part and module."""
    return {**factors(), **{f"{module}.{part}": v for part, found in vectors.items() for module, v in found.items()}}


def magnitudes(size=8):
    return {Q: random(size, seed=5).abs(), V: random(4, seed=6).abs()}


def test_row_norms_are_those_of_the_dense_sum():
    W, A, B = random(20, 12), random(3, 12, seed=1), random(20, 3, seed=2)
    expected = torch.linalg.norm(W.double() + 1.5 * B.double() @ A.double(), dim=1).float()
    torch.testing.assert_close(row_norms(W, Factors(A, B, 1.5)), expected, rtol=1e-6, atol=0)
    half = Factors(A.bfloat16(), B.bfloat16(), 1.5)
    dense = W + 1.5 * half.B.float() @ half.A.float()
    torch.testing.assert_close(row_norms(W, half), dense.norm(dim=1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("suffix", ["", ".weight", ".default", ".default.weight"])
def test_dora_scales_rows_to_its_magnitudes(tmp_path, suffix):
    tensors = with_vectors(**{f"lora_magnitude_vector{suffix}": magnitudes()})
    expert = read_adapter(write_adapter(tmp_path, tensors=tensors, **DORA), "sql")
    assert expert.kinds == ("DoRA",)
    assert expert.exceeds_products
    assert expert.parameters == 2 * (8 + 8) + 2 * (8 + 4) + 8 + 4
    with expert.open_on(BASE) as read:
        for module, m in magnitudes().items():
            (A, B, scale), gain, shift = read(module)
            W, delta = BASE.weight(module), 2.0 * tensors[key_B(module)] @ tensors[key_A(module)]
            tuned = m[:, None] * (W + delta) / (W + delta).norm(dim=1, keepdim=True)
            torch.testing.assert_close(W + scale * B @ A + gain[:, None] * W, tuned, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(scale * B @ A, (gain + 1)[:, None] * delta, rtol=1e-5, atol=1e-5)
            assert shift is None


def test_biases_become_a_shift(tmp_path):
    of_B, trained = {m: v - 1 for m, v in magnitudes().items()}, {Q: random(8, seed=9)}
    tensors = with_vectors(**{"lora_B.bias": of_B, "base_layer.bias": trained})
    expert = read_adapter(write_adapter(tmp_path, tensors=tensors, lora_bias=True, bias="lora_only"), "sql")
    assert expert.kinds == ("lora_bias", "trained biases")
    with expert.open_on(BASE) as read:
        torch.testing.assert_close(read(Q).shift_O, 2.0 * of_B[Q] + trained[Q] - BASE.bias(Q))
        torch.testing.assert_close(read(V).shift_O, 2.0 * of_B[V])
        assert read(Q).gain_O is None
        assert torch.equal(read(Q).factors.B, tensors[key_B(Q)])


def test_groups_of_modules_have_the_factors_of_the_update(tmp_path):
    tensors = with_vectors(lora_magnitude_vector=magnitudes())
    expert = read_adapter(write_adapter(tmp_path, tensors=tensors, **DORA), "sql")
    [stacked] = expert.stacked([[Q]], BASE)
    with expert.open_on(BASE) as read:
        torch.testing.assert_close(stacked.B_NOR[0], read(Q).factors.B)
        torch.testing.assert_close(stacked.A_NRI[0], read(Q).factors.A)


def test_a_plain_adapter_is_read_without_a_base(tmp_path):
    expert = read_adapter(write_adapter(tmp_path), "sql")
    assert (expert.kinds, expert.exceeds_products) == ((), False)
    with expert.open() as read, expert.open_on(Layers({})) as read_on:
        assert torch.equal(read(Q).B, read_on(Q).factors.B)
        assert read_on(Q)[1:] == (None, None)


def test_dora_is_not_read_without_a_base(tmp_path):
    tensors = with_vectors(lora_magnitude_vector=magnitudes())
    expert = read_adapter(write_adapter(tmp_path, tensors=tensors, **DORA), "sql")
    with pytest.raises(AdapterError) as caught, expert.open():
        pass
    assert_says(
        caught.value,
        given=("expert 'sql' is no plain LoRA adapter (DoRA)", "depends on the base model's layers"),
        expected="plain LoRA",
        do="route it in a composed model",
    )


FAULTS = {
    "no magnitude": ({}, DORA, f"{Q} has no DoRA magnitude, which the configuration mentions"),
    "no bias of B": ({}, {"lora_bias": True}, f"{Q} has no bias of the B matrix, which the configuration mentions"),
    "a magnitude of another size": (
        {"lora_magnitude_vector": magnitudes(7)},
        DORA,
        f"{Q}.lora_magnitude_vector has shape (7,), not (8,)",
    ),
    "a magnitude alone": (
        {"lora_magnitude_vector": {**magnitudes(), "embed": random(8)}},
        DORA,
        "embed has a DoRA magnitude, but no factors of a linear layer",
    ),
}


@pytest.mark.parametrize(("vectors", "config", "reason"), FAULTS.values(), ids=FAULTS.keys())
def test_parts_that_are_missing_or_of_other_sizes(tmp_path, vectors, config, reason):
    with pytest.raises(AdapterError) as caught:
        read_adapter(write_adapter(tmp_path, tensors=with_vectors(**vectors), **config), "sql")
    assert_says(caught.value, given=("expert 'sql'", reason), expected="pairs of 2-D factors", do="retrain it")


def test_a_magnitude_that_is_not_finite(tmp_path):
    tensors = with_vectors(lora_magnitude_vector={**magnitudes(), Q: torch.full((8,), torch.nan)})
    with pytest.raises(AdapterError) as caught:
        read_adapter(write_adapter(tmp_path, tensors=tensors, **DORA), "sql")
    given = (f"expert 'sql': {Q}.lora_magnitude_vector holds NaN",)
    assert_says(caught.value, given=given, expected="finite weights", do="train or download")


def test_a_base_that_dora_cannot_scale(tmp_path):
    tensors = with_vectors(lora_magnitude_vector=magnitudes())
    tensors |= {key_B(Q): torch.zeros(8, 2)}
    expert = read_adapter(write_adapter(tmp_path, tensors=tensors, **DORA), "sql")
    with expert.open_on(Layers({Q: torch.zeros(8, 8)})) as read, pytest.raises(AdapterError) as caught:
        read(Q)
    given = (f"expert 'sql': {Q}: W + scale * B @ A has a row of zeros",)
    assert_says(caught.value, given=given, expected="the base model", do="check the base model")


def test_a_trained_bias_of_a_layer_without_one(tmp_path):
    tensors = with_vectors(**{"base_layer.bias": {V: random(4)}})
    expert = read_adapter(write_adapter(tmp_path, tensors=tensors, bias="lora_only"), "sql")
    with expert.open_on(BASE) as read, pytest.raises(AdapterError) as caught:
        read(V)
    given = (f"expert 'sql': {V} has a trained bias in the adapter but no bias in this model",)
    assert_says(caught.value, given=given, expected="the base model", do="load that model")


def test_a_bias_alone_is_an_update(tmp_path):
    tensors = {key: tensor * ("lora_A" in key) for key, tensor in factors().items()}
    tensors |= {f"{module}.lora_B.bias": torch.ones(size) for module, size in ((Q, 8), (V, 4))}
    assert read_adapter(write_adapter(tmp_path / "a", tensors=tensors, lora_bias=True), "sql").kinds == ("lora_bias",)
    tensors |= {f"{module}.lora_B.bias": torch.zeros(size) for module, size in ((Q, 8), (V, 4))}
    with pytest.raises(AdapterError, match="changes nothing"):
        read_adapter(write_adapter(tmp_path / "b", tensors=tensors, lora_bias=True), "sql")


# Initial factors


def saved_initial(folder, seed=7, **config):
    """An adapter with the factors of another one next to it, as they were before training."""
    tensors = factors(rank=3, seed=seed)
    write_adapter(folder / "corda_init", tensors=tensors, rank=3, init_lora_weights=True, **config)
    return tensors


def test_saved_initial_factors_are_subtracted(tmp_path):
    initial = saved_initial(tmp_path)
    expert = read_adapter(write_adapter(tmp_path, init_lora_weights="corda"), "sql")
    assert expert.kinds == ("CorDA",)
    assert (expert.ranks, expert.exceeds_products) == ((5,), False)
    with expert.open_on(Layers({})) as read:
        A, B, scale = read(Q).factors
    trained = factors()
    expected = 2.0 * trained[key_B(Q)] @ trained[key_A(Q)] - 4 / 3 * initial[key_B(Q)] @ initial[key_A(Q)]
    torch.testing.assert_close(scale * B @ A, expected)


def test_a_library_takes_saved_initial_factors_along(tmp_path):
    saved_initial(tmp_path / "a")
    store = LibraryStore(tmp_path / "library")
    entry = store.add("sql", write_adapter(tmp_path / "a", init_lora_weights="corda"))
    assert entry.ranks == (5,)
    assert store.verify() == {"sql": None}
    assert "corda_init/adapter_model.safetensors" in entry.sha256


INITIAL_FAULTS = {
    "other modules": ({}, "differ in the modules model.layers.0.self_attn.v_proj"),
    "of the base": ({"init_lora_weights": "pissa"}, "are PiSSA themselves"),
}


@pytest.mark.parametrize(("config", "reason"), INITIAL_FAULTS.values(), ids=INITIAL_FAULTS.keys())
def test_saved_factors_that_are_not_the_initial_ones(tmp_path, config, reason):
    tensors = factors() if config else {key: tensor for key, tensor in factors().items() if "v_proj" not in key}
    write_adapter(tmp_path / "corda_init", tensors=tensors, **config)
    with pytest.raises(AdapterError) as caught:
        read_adapter(write_adapter(tmp_path, init_lora_weights="corda"), "sql")
    given = ("expert 'sql': the initial factors in", reason)
    assert_says(caught.value, given=given, expected="as it was before training", do="or delete corda_init")
