"""Composed models among the tools that people use with models: compiling, offloading, quantising, copying, training."""

from __future__ import annotations

import copy
import io
import os
import pickle

import pytest
import torch

from models import (
    close,
    greedy,
    logits,
    peft_library,
    peft_model,
    peft_on_new_transformers,
    tiny_llama,
    tokens,
    types_unchecked as unchecked,
)
from spectr import Arrow, Calibrated, Oracle, Shortlist, Spectr, Uniform, build_index, calibrate, compose, trace
from text_model import make_tokenizer

RANKS = {"ants": 4, "bees": 2, "cats": 8}
ROUTERS = [Spectr(top_k=2), Spectr(top_k=2, weights="softmax"), Arrow(top_k=2), Uniform()]
DOWN = "model.layers.1.mlp.down_proj"
ids = tokens(batch=2, length=6)


def named(router):
    return f"{type(router).__name__}-{getattr(router, 'weights', 'mean')}"


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return peft_library(tiny_llama(), tmp_path_factory.mktemp("experts"), RANKS)


def routed_llama(library, router=None):
    model = tiny_llama()
    return model, compose(model, library, router or Spectr(top_k=2))


# torch.compile


@pytest.fixture
def compiled():
    """``torch.compile`` into one graph, without the type checks of the tests, forgetting all graphs afterwards."""
    with unchecked():
        torch._dynamo.reset()
        yield lambda model, backend="eager": torch.compile(model, fullgraph=True, backend=backend)
        torch._dynamo.reset()


def one_layer(library, router=None):
    """A Llama of one layer is enough for a graph, and quicker."""
    model = tiny_llama(num_hidden_layers=1)
    return model, compose(model, library, router or Spectr(top_k=2))


@pytest.fixture(scope="module")
def shallow(tmp_path_factory):
    return peft_library(tiny_llama(num_hidden_layers=1), tmp_path_factory.mktemp("shallow"), RANKS)


@pytest.mark.parametrize("router", [Spectr(top_k=2, weights="softmax"), Arrow(top_k=2), Uniform()], ids=named)
def test_a_routed_model_is_one_graph_that_equals_eager(shallow, compiled, router):
    model, _ = one_layer(shallow, router)
    close(logits(compiled(model), ids), logits(model, ids))


def test_a_routed_model_of_equal_ranks_and_merged_factors_is_one_graph(tmp_path, compiled):
    experts = peft_library(tiny_llama(num_hidden_layers=1), tmp_path, {"ants": 4, "bees": 4})
    model, _ = one_layer(experts, Spectr(top_k=2, combine="factors"))
    close(logits(compiled(model), ids), logits(model, ids))


SLOW = pytest.mark.skipif(not os.environ.get("SPECTR_TEST_INDUCTOR"), reason="half a minute of a C++ compiler's time")


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=SLOW)])
@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")  # inductor's own imports
def test_a_routed_model_compiles_with(shallow, compiled, backend):
    model, _ = one_layer(shallow)
    close(logits(compiled(model, backend), ids, use_cache=False), logits(model, ids, use_cache=False))


def test_a_compiled_model_notices_every_change(shallow, compiled):
    model, routed = one_layer(shallow)
    fast = compiled(model)
    close(logits(fast, ids), logits(model, ids))
    routed.allow(["cats"])
    close(logits(fast, ids), logits(one_layer(shallow, Oracle(expert="cats"))[0], ids))
    routed.allow(["ants"])
    close(logits(fast, ids), logits(one_layer(shallow, Oracle(expert="ants"))[0], ids))
    routed.remove()
    close(logits(fast, ids), logits(tiny_llama(num_hidden_layers=1), ids))


def test_a_model_that_was_compiled_before_it_is_composed_notices(shallow, compiled):
    model = tiny_llama(num_hidden_layers=1)
    fast = compiled(model)
    close(logits(fast, ids), logits(tiny_llama(num_hidden_layers=1), ids))
    compose(model, shallow, Spectr(top_k=2))
    close(logits(fast, ids), logits(one_layer(shallow)[0], ids))


def test_other_batches_and_lengths_run_through_a_compiled_model(shallow, compiled):
    model, _ = one_layer(shallow)
    fast = compiled(model)
    for batch, length in ((2, 6), (1, 9)):
        sample = tokens(batch, length, seed=length)
        close(logits(fast, sample), logits(model, sample))


# accelerate


def on_cpu_only(model, folder):
    from accelerate import cpu_offload

    return cpu_offload(model, execution_device=torch.device("cpu"))


def on_disk(model, folder):
    from accelerate import disk_offload

    return disk_offload(model, folder, execution_device=torch.device("cpu"))


def in_parts(model, folder):
    from accelerate import dispatch_model

    parts = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    parts |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "disk"}
    return dispatch_model(model, parts, main_device="cpu", offload_dir=folder, force_hooks=True)


OFFLOADS = [on_cpu_only, on_disk, in_parts]


@pytest.mark.parametrize("offload", OFFLOADS)
@pytest.mark.parametrize("router", [Spectr(top_k=2), Arrow(top_k=2)], ids=named)
def test_an_offloaded_model_is_routed_like_the_plain_one(library, tmp_path, offload, router):
    model = offload(tiny_llama(), str(tmp_path))
    plain = logits(model, ids)
    routed = compose(model, library, router)
    assert model.get_submodule(DOWN).weight.is_meta
    assert not model.get_submodule(DOWN).A_PI.is_meta
    assert torch.equal(logits(model, ids), logits(routed_llama(library, router)[0], ids))
    assert model.get_submodule(DOWN).weight.is_meta
    assert torch.equal(greedy(model, ids), greedy(routed_llama(library, router)[0], ids))
    assert torch.equal(logits(routed.remove(), ids), plain)


@pytest.mark.parametrize("offload", OFFLOADS)
def test_an_offloaded_model_can_be_restricted_and_traced(library, tmp_path, offload):
    model = offload(tiny_llama(), str(tmp_path))
    routed = compose(model, library, Spectr(top_k=2)).allow(["ants", "bees"])
    with trace(model) as record:
        out = logits(model, ids)
    other, handle = routed_llama(library)
    handle.allow(["ants", "bees"])
    assert torch.equal(out, logits(other, ids))
    assert record.shares() == pytest.approx({"ants": 0.5, "bees": 0.5})
    routed.allow(None)
    assert torch.equal(logits(model, ids), logits(routed_llama(library)[0], ids))


@pytest.mark.parametrize("offload", OFFLOADS)
@pytest.mark.parametrize("router", [Calibrated(), Shortlist(size=2)], ids=named)
def test_an_offloaded_model_decides_for_prompts_as_the_plain_one(library, tmp_path, monkeypatch, offload, router):
    monkeypatch.setattr("spectr.calibration._NULL_TOKENS", 8)  # each is a step from disk

    def indexed(model):
        made = calibrate(model, library, make_tokenizer(), samples=2, tokens=6, null=3)
        return build_index(model, library.with_calibration(made))

    theirs, plain = indexed(tiny_llama()), tiny_llama()
    wanted = compose(plain, theirs, router)
    model = offload(tiny_llama(), str(tmp_path))
    ours = indexed(model)
    assert ours.calibration.null == theirs.calibration.null
    routed = compose(model, ours, router)
    routed.allow(["ants", "bees"])
    wanted.allow(["ants", "bees"])
    close(routed.prompt.evidence(input_ids=ids), wanted.prompt.evidence(input_ids=ids), 1e-4)
    assert torch.equal(greedy(model, ids), greedy(plain, ids))


# bitsandbytes


@pytest.fixture(scope="module")
def saved_llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    tiny_llama(hidden_size=64, intermediate_size=64).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_base_is_routed_as_peft_adapts_it(saved_llama, tmp_path, bits):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig, LlamaForCausalLM

    settings = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8, bnb_4bit_compute_dtype=torch.float32)

    def quantised():
        return LlamaForCausalLM.from_pretrained(
            saved_llama, quantization_config=settings, device_map="cpu", dtype=torch.float32
        ).eval()

    model = quantised()
    assert not model.get_submodule(DOWN).weight.is_floating_point()
    plain = logits(model, ids)
    experts = peft_library(LlamaForCausalLM.from_pretrained(saved_llama), tmp_path, {"ants": 4, "bees": 2})
    routed = compose(model, experts, Oracle(expert="ants"))
    assert len(routed.layers) == 14
    assert {layer.A_PI.dtype for layer in routed.layers.values()} == {torch.float32}
    ours = logits(model, ids)
    from peft import PeftModel

    with peft_on_new_transformers():
        theirs = logits(PeftModel.from_pretrained(quantised(), tmp_path / "ants").eval(), ids)
    close(ours, theirs, {4: 1e-4, 8: 1 / 127}[bits])  # 8-bit layers round their inputs to int8, too
    assert (ours - plain).abs().max() > 0.05 * plain.abs().max()
    assert torch.equal(logits(routed.remove(), ids), plain)


# Copies and files


def by_deepcopy(model):
    return copy.deepcopy(model)


def by_pickle(model):
    return pickle.loads(pickle.dumps(model))


def by_torch_save(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [by_deepcopy, by_pickle, by_torch_save])
@pytest.mark.parametrize("router", ROUTERS, ids=named)
def test_a_copy_computes_the_same_and_lives_on_its_own(library, copied, router):
    model, routed = routed_llama(library, router)
    before = logits(model, ids)
    twin = copied(model)
    routed.remove()
    assert torch.equal(logits(twin, ids), before)
    assert list(twin.state_dict()) == list(tiny_llama().state_dict())
    twin.load_state_dict(tiny_llama(seed=1).state_dict())
    other = tiny_llama(seed=1)
    compose(other, library, router)
    assert torch.equal(logits(twin, ids), logits(other, ids))
    with trace(twin) as record:
        logits(twin, ids)
    assert record.experts == tuple(RANKS)


def test_a_copy_of_the_handle_has_a_model_of_its_own(library):
    model, routed = routed_llama(library)
    before = logits(model, ids)
    twin = copy.deepcopy(routed)
    twin.remove()
    assert torch.equal(logits(model, ids), before)
    assert torch.equal(logits(twin.model, ids), logits(tiny_llama(), ids))


# dtypes and devices


@pytest.mark.parametrize(
    ("cast", "dtype"),
    [
        (lambda model: model.to(torch.bfloat16), torch.bfloat16),
        (lambda model: model.half(), torch.float16),
        (lambda model: model.double(), torch.float64),
    ],
    ids=["to", "half", "double"],
)
@pytest.mark.parametrize("router", [Spectr(top_k=2), Arrow(top_k=2)], ids=named)
def test_casting_a_composed_model_casts_its_experts(library, cast, dtype, router):
    """The same bits as composing a model of that dtype."""
    model, routed = routed_llama(library, router)
    cast(model)
    for layer in routed.layers.values():
        assert {layer.A_PI.dtype, layer.B_OP.dtype, layer.weight.dtype} == {dtype}
        assert layer.owner_P.dtype == torch.int64
    other = cast(tiny_llama())
    compose(other, library, router)
    assert torch.equal(logits(model, ids), logits(other, ids))


def test_a_composed_model_moves_as_a_whole(library):
    model, _ = routed_llama(library)
    model.to("meta")
    assert all(t.is_meta for t in [*model.parameters(), *model.buffers()])


# Training around the experts


def input_gradient(model):
    model.train()
    generator = torch.Generator().manual_seed(0)
    embeds = torch.randn(2, 6, 32, generator=generator).requires_grad_()
    model(inputs_embeds=embeds).logits.square().mean().backward()
    return embeds.grad


def test_gradients_flow_through_the_experts_as_they_do_in_peft(library):
    model, _ = routed_llama(library, Oracle(expert="cats"))
    close(input_gradient(model), input_gradient(peft_model(tiny_llama(), library["cats"].origin)), 1e-5)


@pytest.mark.parametrize("router", ROUTERS, ids=named)
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")  # its heir is too new
def test_gradient_checkpointing_changes_no_gradient(library, router, reentrant):
    model, _ = routed_llama(library, router)
    plain = input_gradient(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert plain.abs().max() > 0
    assert torch.equal(input_gradient(model), plain)


def test_experts_are_not_parameters_and_are_not_trained(library):
    model, routed = routed_llama(library)
    count = sum(p.numel() for p in tiny_llama().parameters())
    assert sum(p.numel() for p in model.parameters()) == count
    input_gradient(model)
    assert all(layer.A_PI.grad is None and not layer.A_PI.requires_grad for layer in routed.layers.values())


def test_training_mode_computes_the_same_as_evaluation(library):
    model, _ = routed_llama(library)
    before = logits(model, ids)
    model.train()
    assert torch.equal(logits(model, ids), before)
