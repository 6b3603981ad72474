"""A prompt is read for a decision without dropout, whatever mode the model is in, and no module is changed."""

from __future__ import annotations

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from sequences import World, make_tokenizer
from transformers import OPTConfig, OPTForCausalLM

import spectr
from models import TOKENS, VOCAB, build, tiny_llama, tokens
from spectr import calibrate
from spectr.layers.eval_mode import eval_mode


def modes(model):
    return [module.training for module in model.modules()]


@pytest.fixture(scope="module")
def dropping(tmp_path_factory):
    with torch.no_grad():
        return World(tiny_llama(attention_dropout=0.5), tmp_path_factory.mktemp("llama"), calibrated=True)


@pytest.mark.parametrize("router", [spectr.Calibrated(), spectr.Shortlist(size=2)], ids=["calibrated", "shortlist"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_decisions_are_those_of_eval_mode(dropping, router, checkpointed):
    want, (model, routed), ids = dropping.routed(router)[1], dropping.routed(router), tokens(3, 9, 5)
    if checkpointed:
        model.activation_checkpointing_enable()
    model.train()
    model.model.layers[0].eval()  # each module keeps its own mode
    before, state = modes(model), torch.get_rng_state()
    assert torch.equal(routed.prompt.evidence(input_ids=ids), want.prompt.evidence(input_ids=ids))
    assert torch.equal(torch.get_rng_state(), state)
    assert modes(model) == before
    with torch.enable_grad():
        first, second = (model(input_ids=ids, labels=ids).loss for _ in range(2))
        first.backward()
    assert first != second  # the answer has its dropout
    assert torch.equal(routed.prompt.weights_BE, want.prompt.decide(input_ids=ids).cpu())


def test_layers_that_training_drops_are_read(tmp_path):
    sizes = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "init_std": 0.25}
    config = OPTConfig(vocab_size=VOCAB, word_embed_proj_dim=32, dropout=0.5, layerdrop=0.9, **sizes, **TOKENS)
    world = World(build(OPTForCausalLM, config), tmp_path, calibrated=True)
    want, (model, routed), ids = world.routed(spectr.Calibrated())[1], world.routed(spectr.Calibrated()), tokens(2, 7)
    model.train()
    assert torch.equal(routed.prompt.evidence(input_ids=ids), want.prompt.evidence(input_ids=ids))


def test_a_model_in_train_mode_is_calibrated_alike(dropping):
    library, made = dropping.library, []
    for training in (False, True):
        model = copy.deepcopy(dropping.base).train(training)
        made.append(calibrate(model, library, make_tokenizer(), samples=3, tokens=6, null=3, fresh=True))
    assert made[0].null == made[1].null
    for name, mean_I in made[0].means.items():
        assert torch.equal(mean_I, made[1].means[name])


def test_another_thread_trains_meanwhile(dropping):
    model, found = copy.deepcopy(dropping.base).train(), {}
    entered, seen = threading.Event(), threading.Event()

    def read():
        with eval_mode(model):
            entered.set()
            assert seen.wait(10)
            found["reads"] = modes(model)

    reader = threading.Thread(target=read)
    reader.start()
    assert entered.wait(10)
    found["trains"] = modes(model)
    model.lm_head.eval()  # is kept
    seen.set()
    reader.join()
    assert all(found["trains"])
    assert not any(found["reads"])
    assert not model.lm_head.training
    assert model.model.training
    assert "training" not in vars(torch.nn.Module)


def test_threads_that_read_at_once_end_in_any_order(dropping):
    compiled, (first_in, second_in, first_out) = [], (threading.Event() for _ in range(3))

    def backend(graph, _):
        compiled.append(graph)
        return graph.forward

    torch.compile(lambda x: x + 1, backend=backend)(torch.ones(2))
    model = copy.deepcopy(dropping.base).train()

    def first():
        with eval_mode(model):
            first_in.set()
            assert second_in.wait(10)
        first_out.set()

    def second():
        assert first_in.wait(10)
        with eval_mode(model):
            second_in.set()
            assert first_out.wait(10)
            assert not any(modes(model))

    with ThreadPoolExecutor() as pool:
        for work in [pool.submit(first), pool.submit(second)]:
            work.result()
    assert all(modes(model))
    assert "training" not in vars(torch.nn.Module)
    torch.compile(lambda x: x + 2, backend=backend)(torch.ones(2))
    assert len(compiled) == 2  # torch compiles as before
