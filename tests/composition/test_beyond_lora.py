"""Experts whose updates are more than two factors, in composed models: DoRA and biases, as PEFT computes them."""

import copy
import pickle

import pytest
import torch

from adapters_on_disk import assert_says, tiny_gpt2
from beyond_lora import KINDS, TARGETS, moved_adapter, tiny_qwen
from families import FAMILIES
from models import close, logits, peft_adapter, peft_model, tokens
from spectr import Arrow, ExpertLibrary, Lag, Oracle, Seqr, Spectr, Uniform, compose
from spectr.errors import AdapterError, CompositionError
from spectr.layers import initial_factors as initial_module
from spectr.layers.base_layers import ModelLayers
from spectr.spectral.initial import pissa_factors

ids = tokens(batch=3, length=6)
Q, V = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"
CONV1D = {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Experts of all kinds, and two plain ones, for :func:`tiny_qwen`."""
    root = tmp_path_factory.mktemp("experts")
    moved_adapter(tiny_qwen(), root / "ants", 1, **KINDS["DoRA"])
    moved_adapter(tiny_qwen(), root / "bees", 2, **KINDS["lora_bias"])
    moved_adapter(tiny_qwen(), root / "cats", 3, **KINDS["DoRA with trained biases"])
    for seed, name in enumerate(("dogs", "eels"), start=4):
        peft_adapter(tiny_qwen(), root / name, seed, targets=TARGETS)
    return root


@pytest.fixture(scope="module")
def library(root):
    return ExpertLibrary.open(root)


def composed(library, router):
    model = tiny_qwen()
    return model, compose(model, library, router)


def tuned_layers(root, module, names):
    """By expert the module's outputs of an input in PEFT's own model, less the base layer's."""
    base = tiny_qwen().get_submodule(module)
    layers = {name: peft_model(tiny_qwen(), root / name).get_submodule(f"base_model.model.{module}") for name in names}
    return {name: lambda x, layer=layer: (layer(x) - base(x)).detach() for name, layer in layers.items()}, base


@pytest.mark.parametrize("config", [*KINDS.values(), {"bias": "all"}], ids=[*KINDS, "all"])
def test_one_expert_is_what_peft_computes(tmp_path, config):
    folder = moved_adapter(tiny_qwen(), tmp_path / "ants", 1, **config)
    model, routed = composed(ExpertLibrary.from_adapters({"ants": folder}), Oracle(expert="ants"))
    theirs, plain = logits(peft_model(tiny_qwen(), folder), ids), logits(tiny_qwen(), ids)
    assert (theirs - plain).abs().max() > 0.05 * plain.abs().max()
    close(logits(model, ids), theirs)
    assert torch.equal(logits(routed.remove(), ids), plain)


def test_transposed_layers(tmp_path):
    ids = torch.tensor([[3, 5, 7, 9]])
    folder = moved_adapter(tiny_gpt2(), tmp_path / "ants", 1, use_dora=True, **CONV1D)
    model = tiny_gpt2()
    compose(model, ExpertLibrary.from_adapters({"ants": folder}), Oracle(expert="ants"))
    close(logits(model, ids), logits(peft_model(tiny_gpt2(), folder), ids))


@pytest.mark.parametrize(
    "router", [Spectr(top_k=2, weights="softmax"), Arrow(top_k=3), Uniform(), Lag(), Seqr(top_k=2)], ids=repr
)
def test_each_token_gets_the_weighted_sum_of_the_whole_updates(root, library, router):
    model, _ = composed(library, router)
    x = torch.randn(4, 5, 32, generator=torch.Generator().manual_seed(0))
    for module in (Q, V):
        layer = model.get_submodule(module)
        updates, base = tuned_layers(root, module, library.names)
        weights_TE = layer.route(x).weights_TE
        added = [weights_TE[..., e, None] * updates[name](x) for e, name in enumerate(layer.experts)]
        with torch.no_grad():
            close(layer(x), base(x) + sum(added))


def test_experts_are_scored_by_their_factors_alone(root, library):
    model, _ = composed(library, Spectr(top_k=2))
    x = torch.randn(7, 32, generator=torch.Generator().manual_seed(0))
    scores_TE = model.get_submodule(Q).scores(x)
    with library["ants"].open_on(ModelLayers(tiny_qwen())) as read:
        A, B, scale = read(Q).factors
    close(scores_TE[:, 0], (scale * x @ (B @ A).mT).norm(dim=1))
    W = tiny_qwen().get_submodule(Q).weight
    dora = peft_model(tiny_qwen(), root / "ants").get_submodule(f"base_model.model.{Q}")
    m = dora.lora_magnitude_vector["default"].weight
    dense = dora.get_delta_weight("default")
    close(scale * B @ A, m[:, None] / (W + dense).norm(dim=1, keepdim=True) * dense)


def test_plain_experts_keep_their_kernels(library):
    model, routed = composed(library, Spectr(top_k=2))
    layer = model.get_submodule(Q)
    assert layer.factors.plan.backend is None
    assert layer.subset(("dogs", "eels")).gain_EO is None
    assert layer.subset(("dogs", "bees")).shift_EO is not None
    routed.allow(["dogs", "eels"])
    alone, _ = composed(library.without("ants").without("bees").without("cats"), Spectr(top_k=2))
    plans = [m.get_submodule(Q).factors for m in (model, alone)]
    assert not any(held.exceeds_products for held in plans)
    assert plans[0].plan.backend is plans[1].plan.backend
    assert torch.equal(logits(model, ids), logits(alone, ids))


def test_experts_come_and_go(root, library):
    model, routed = composed(library.without("ants"), Spectr(top_k=2))
    routed.add("ants", root / "ants")
    whole, _ = composed(library, Spectr(top_k=2))
    assert torch.equal(logits(model, ids), logits(whole, ids))
    routed.allow(["ants"])
    routed.allow(None)
    assert torch.equal(logits(model, ids), logits(whole, ids))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_computes_the_same(library, copied):
    model, _ = composed(library, Spectr(top_k=2))
    other = copied(model)
    assert torch.equal(logits(other, ids), logits(model, ids))
    close(logits(other.double(), ids).float(), logits(model, ids), 1e-4)


def test_gradients_reach_the_input_through_the_gain(root, library):
    model, _ = composed(library, Oracle(expert="ants"))
    theirs = peft_model(tiny_qwen(), root / "ants")
    found = []
    for module in (model, theirs.base_model.model):
        embedded = module.get_input_embeddings()(ids).detach().requires_grad_()
        module(inputs_embeds=embedded).logits.square().sum().backward()
        found.append(embedded.grad)
    close(found[0], found[1], 1e-4)


@pytest.mark.parametrize("combine", ["factors", "ties", "dare:density=0.5", "dare-ties", "knots"])
def test_combinations_of_products_refuse_more(library, combine):
    model = tiny_qwen()
    with pytest.raises(CompositionError) as caught:
        compose(model, library, Spectr(top_k=2, combine=combine))
    assert_says(
        caught.value,
        given=(f"combine='{combine}' merges products", "ants (DoRA), bees (lora_bias), cats (DoRA, trained biases)"),
        expected="experts without DoRA and biases",
        do="use combine='outputs'",
    )
    assert torch.equal(logits(model, ids), logits(tiny_qwen(), ids))


def test_a_base_without_the_bias_is_refused_before_anything_changes(root):
    model = tiny_qwen()
    for layer in model.model.layers:
        layer.self_attn.q_proj.bias = None
    with pytest.raises(AdapterError, match=r"expert 'cats'.*q_proj has a trained bias"):
        compose(model, ExpertLibrary.from_adapters({"cats": root / "cats"}), Oracle(expert="cats"))
    assert type(model.get_submodule(Q)) is torch.nn.Linear


INITIAL = {
    "PiSSA": {"init_lora_weights": "pissa"},
    "OLoRA": {"init_lora_weights": "olora"},
    "OLoRA with rsLoRA": {"init_lora_weights": "olora", "use_rslora": True},
    "DoRA with PiSSA": {"init_lora_weights": "pissa", "use_dora": True},
}


@pytest.mark.parametrize("config", INITIAL.values(), ids=INITIAL.keys())
def test_initial_factors_are_taken_out_of_the_base_as_by_peft(tmp_path, config):
    folder = moved_adapter(tiny_qwen(), tmp_path / "ants", 1, **config)
    model, _ = composed(ExpertLibrary.from_adapters({"ants": folder}), Oracle(expert="ants"))
    theirs, plain = logits(peft_model(tiny_qwen(), folder), ids), logits(tiny_qwen(), ids)
    assert (theirs - plain).abs().max() > 0.05 * plain.abs().max()
    close(logits(model, ids), theirs)


def test_initial_factors_of_transposed_layers(tmp_path):
    ids, kinds = torch.tensor([[3, 5, 7, 9]]), {"pissa": ["c_attn", "c_proj"], "olora": ["attn.c_proj"]}
    for kind, targets in kinds.items():
        config = {**CONV1D, "target_modules": targets, "init_lora_weights": kind}
        folder = moved_adapter(tiny_gpt2(), tmp_path / kind, 1, **config)
        model = tiny_gpt2()
        compose(model, ExpertLibrary.from_adapters({"ants": folder}), Oracle(expert="ants"))
        close(logits(model, ids), logits(peft_model(tiny_gpt2(), folder), ids))


@pytest.mark.parametrize("kind", ["pissa", "olora"])
def test_initial_factors_of_a_linear_layer_with_its_own_forward(tmp_path, kind):
    falcon = FAMILIES["falcon"]
    folder = moved_adapter(falcon.build(), tmp_path / "ants", 1, init_lora_weights=kind, target_modules=falcon.plain)
    model = falcon.build()
    compose(model, ExpertLibrary.from_adapters({"ants": folder}), Oracle(expert="ants"))
    close(logits(model, ids), logits(peft_model(falcon.build(), folder), ids))


def test_products_without_initial_factors_are_combined_in_all_ways(tmp_path):
    for seed, name in enumerate(("ants", "bees")):
        moved_adapter(tiny_qwen(), tmp_path / name, seed, init_lora_weights="pissa")
    model, _ = composed(ExpertLibrary.open(tmp_path), Spectr(top_k=2, combine="ties"))
    assert logits(model, ids).isfinite().all()


def test_a_weight_is_decomposed_once_and_kept_in_the_library(tmp_path, monkeypatch):
    moved_adapter(tiny_qwen(), tmp_path / "ants", 1, init_lora_weights="pissa")
    made = []
    monkeypatch.setattr(initial_module, "pissa_factors", lambda W, r: made.append(W) or pissa_factors(W, r))
    library = ExpertLibrary.open(tmp_path)
    first, _ = composed(library, Oracle(expert="ants"))
    kept = sorted((tmp_path / "initial-factors").iterdir())
    assert len(made) == len(kept) == 4
    assert kept[0].name == "pissa-4-model.layers.0.self_attn.q_proj.safetensors"
    again, _ = composed(ExpertLibrary.open(tmp_path), Oracle(expert="ants"))
    assert len(made) == 4
    assert torch.equal(logits(again, ids), logits(first, ids))
    other = tiny_qwen()
    other.get_submodule(Q).weight.data += 0.01
    compose(other, library, Oracle(expert="ants"))
    assert len(made) == 5
    kept[0].write_bytes(b"damaged")
    composed(library, Oracle(expert="ants"))
    assert len(made) == 6


@pytest.mark.parametrize("bits", [4, 8])
def test_the_weight_of_a_quantised_layer_is_the_one_it_computes_with(tmp_path, bits):
    pytest.importorskip("bitsandbytes")
    from peft import PeftModel
    from peft.utils.integrations import dequantize_module_weight
    from transformers import BitsAndBytesConfig, Qwen2ForCausalLM

    tiny_qwen(hidden_size=64, intermediate_size=64).save_pretrained(tmp_path / "base")
    settings = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8, bnb_4bit_compute_dtype=torch.float32)

    def quantised():
        options = {"quantization_config": settings, "device_map": "cpu", "dtype": torch.float32}
        return Qwen2ForCausalLM.from_pretrained(tmp_path / "base", **options).eval()

    model = quantised()
    dense = dequantize_module_weight(quantised().get_submodule(Q)).float()
    close(ModelLayers(model).weight(Q), dense, {4: 1e-5, 8: 1e-2}[bits])
    folder = moved_adapter(tiny_qwen(hidden_size=64, intermediate_size=64), tmp_path / "ants", 1, use_dora=True)
    compose(model, ExpertLibrary.from_adapters({"ants": folder}), Oracle(expert="ants"))
    with pytest.raises(AdapterError, match="q_proj is quantised"):
        ModelLayers(model).initial(Q, "pissa", 4, 2.0)
    theirs = logits(PeftModel.from_pretrained(quantised(), folder).eval(), ids)
    close(logits(model, ids), theirs, {4: 1e-4, 8: 2 / 127}[bits])
