"""Composing on a tiny Llama: invariances, changes while it lives, and the way back."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from composing import RANKS, ROUTERS, UP, Q, V, composed, folders, ids, module_adapter, same, weights
from safetensors.torch import load_file
from torch import nn

from models import (
    build,
    close,
    dense_deltas,
    greedy,
    identities,
    logits,
    tiny_llama,
)
from spectr import Arrow, ExpertLibrary, Oracle, RoutedLinear, Spectr, Uniform, compose

# Invariances


@pytest.mark.parametrize("router", ROUTERS, ids=repr)
def test_the_order_in_which_experts_are_given_changes_nothing(root, router):
    one, _ = composed(ExpertLibrary.from_adapters(folders(root, *RANKS)), router)
    other, _ = composed(ExpertLibrary.from_adapters(folders(root, *reversed(RANKS))), router)
    same(weights(one), weights(other))


@pytest.mark.parametrize("router", ROUTERS, ids=repr)
def test_a_batch_is_routed_like_its_members_one_by_one(library, router):
    model, _ = composed(library, router)
    model.double()  # in float32 few tokens are summed in another order than many, and a softmax sees the rounding
    table, out = weights(model)
    for b in range(len(ids)):
        alone = logits(model, ids[b : b + 1])
        close(alone[0], out[b], 1e-10)
    assert all(weight.shape == ids.shape for by_expert in table.values() for weight in by_expert.values())


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("router", ROUTERS, ids=repr)
def test_padding_changes_neither_selections_nor_logits_of_the_tokens(library, router, side):
    model, _ = composed(library, router)
    short = ids[:1, :5]
    pad = torch.zeros(1, 3, dtype=torch.long)
    row = torch.cat([pad, short] if side == "left" else [short, pad], dim=1)
    real = row != 0
    batch = torch.cat([row, ids[1:2]])
    mask = torch.cat([real, torch.ones_like(real)]).long()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    layer = model.get_submodule(V)
    seen = []
    handle = layer.register_forward_pre_hook(lambda m, x: seen.append(m.route(x[0]).weights_TE))
    padded = logits(model, batch, attention_mask=mask, position_ids=positions)
    alone = logits(model, short)
    handle.remove()
    close(padded[0][real[0]], alone[0])
    torch.testing.assert_close(seen[0][0][real[0]], seen[1][0], rtol=0, atol=1e-5)
    assert torch.equal(seen[0][0][real[0]] > 0, seen[1][0] > 0)


@pytest.mark.parametrize("router", [Spectr(top_k=2), Spectr(top_k=2, score="projection"), Arrow(top_k=2)], ids=repr)
@pytest.mark.parametrize("kind", ["equal", "unequal"])
def test_an_unrelated_expert_leaves_the_scores_of_the_others_alone(root, router, kind):
    x = torch.randn(20, 32, generator=torch.Generator().manual_seed(0))
    model, routed = composed(ExpertLibrary.open(root / kind), router)
    before = model.get_submodule(Q).route(x).scores_TE
    routed.add("eels", root / "extra" / "eels")
    after = model.get_submodule(Q)
    assert after.experts == (*RANKS, "eels")
    torch.testing.assert_close(after.route(x).scores_TE[:, :4], before, rtol=2e-6, atol=2e-6)


# Restricting, adding, discarding


@pytest.mark.parametrize("allowed", [["bees"], ["dogs", "ants"], ["cats", "ants", "dogs"]], ids="-".join)
@pytest.mark.parametrize(
    "make", [lambda k: Spectr(top_k=k), lambda k: Arrow(top_k=k), lambda k: Uniform()], ids=["spectr", "arrow", "mu"]
)
@pytest.mark.parametrize("kind", ["equal", "unequal"])
def test_allowing_some_is_a_library_of_those_alone(root, make, allowed, kind):
    """Selections, outputs, bit for bit; also where fewer are allowed than the router takes."""
    model, routed = composed(ExpertLibrary.open(root / kind), make(2))
    routed.allow(allowed)
    small = ExpertLibrary.from_adapters({name: root / kind / name for name in allowed})
    alone, _ = composed(small, make(min(2, len(allowed))))
    assert routed.experts == tuple(sorted(allowed))
    same(weights(model), weights(alone))


def test_one_name_is_a_list_of_one(model, library):
    routed = compose(model, library, Spectr(top_k=2)).allow("bees")
    assert routed.experts == ("bees",)


@pytest.mark.parametrize("router", ROUTERS, ids=repr)
def test_allowing_all_again_restores_the_whole_library(library, router):
    model, routed = composed(library, router)
    before = weights(model)
    routed.allow(["cats", "ants"])
    routed.allow(["dogs", "cats"])
    routed.allow(None)
    same(weights(model), before)


def test_what_is_not_allowed_is_not_in_memory(model, library):
    routed = compose(model, library, Spectr(top_k=2))
    rows = {name: layer.A_PI.shape[0] for name, layer in routed.layers.items()}
    routed.allow(["bees"])
    assert {name: layer.A_PI.shape[0] * 4 for name, layer in routed.layers.items()} == rows


@pytest.mark.parametrize("router", [Spectr(top_k=2), Arrow(top_k=2), Uniform()], ids=repr)
def test_adding_while_alive_is_composing_anew(root, router):
    model, routed = composed(ExpertLibrary.from_adapters(folders(root, "ants", "cats")), router)
    routed.add("dogs", root / "equal" / "dogs").add("bees", root / "equal" / "bees")
    anew, _ = composed(ExpertLibrary.open(root / "equal"), router)
    assert routed.experts == tuple(RANKS)
    same(weights(model), weights(anew))


@pytest.mark.parametrize("router", [Spectr(top_k=2), Arrow(top_k=2), Uniform()], ids=repr)
def test_discarding_while_alive_is_composing_anew(root, router):
    model, routed = composed(ExpertLibrary.open(root / "equal"), router)
    routed.discard("bees")
    anew, _ = composed(ExpertLibrary.from_adapters(folders(root, "ants", "cats", "dogs")), router)
    assert "bees" not in routed.library
    same(weights(model), weights(anew))


def test_adding_under_a_restriction_waits_for_its_permission(root, model):
    routed = compose(model, ExpertLibrary.from_adapters(folders(root, "ants", "bees")), Spectr(top_k=1))
    routed.allow(["ants"]).add("cats", root / "equal" / "cats")
    assert routed.experts == ("ants",)
    assert routed.allow(["ants", "cats"]).experts == ("ants", "cats")


def test_discarding_under_a_restriction_keeps_the_restriction(model, library):
    routed = compose(model, library, Spectr(top_k=1)).allow(["ants", "bees"]).discard("bees")
    assert routed.experts == ("ants",)
    assert routed.allow(None).experts == ("ants", "cats", "dogs")


def test_the_library_on_disk_stays_as_it_is(root, library, model):
    routed = compose(model, library, Spectr(top_k=1))
    routed.discard("ants").add("eels", root / "extra" / "eels")
    assert library.names == ExpertLibrary.open(root / "equal").names == tuple(RANKS)


# Experts that adapt only some of the layers


def test_layers_take_the_experts_that_there_are(root, model):
    plain = identities(model)
    routed = compose(model, ExpertLibrary.open(root / "partial"), Spectr(top_k=2))
    table, out = weights(model)
    assert torch.isfinite(out).all()
    assert list(table[Q]) == ["ants", "bees", "cats"]
    assert list(table["model.layers.1.self_attn.q_proj"]) == ["ants", "bees"]
    assert list(table["model.layers.0.mlp.up_proj"]) == ["ants"]
    assert (sum((w > 0).long() for w in table[Q].values()) == 2).all()
    assert (table["model.layers.0.mlp.up_proj"]["ants"] == 1).all()
    untouched = {"model.layers.1.mlp.down_proj", "lm_head"}
    assert untouched.isdisjoint(routed.layers)
    assert {identities(model)[name] == plain[name] for name in untouched} == {True}


def test_a_layer_whose_last_expert_goes_is_the_plain_layer_again(root, model):
    down = "model.layers.0.mlp.down_proj"
    plain = model.get_submodule(down)
    routed = compose(model, ExpertLibrary.open(root / "partial"), Spectr(top_k=1))
    assert isinstance(model.get_submodule(down), RoutedLinear)
    routed.allow(["cats"])
    assert list(routed.layers) == [Q]
    assert model.get_submodule(down) is plain
    routed.allow(None)
    assert model.get_submodule(down).base is plain


def test_uniform_divides_by_the_experts_of_the_layer(root, model):
    base = model.get_submodule(Q)
    compose(model, ExpertLibrary.open(root / "partial"), Uniform())
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    delta = sum(dense_deltas(root / "partial" / name)[Q] for name in ("ants", "bees", "cats")) / 3
    expected = base(x).double() + x.double() @ delta.T
    torch.testing.assert_close(model.get_submodule(Q)(x).double(), expected, rtol=0, atol=1e-5)


# The way back


@pytest.mark.parametrize("changes", [[], ["allow"], ["allow", "none", "add", "discard"]], ids="-".join)
def test_remove_gives_the_very_same_model_back(root, library, model, changes):
    objects, names, out = identities(model), [n for n, _ in model.named_parameters()], logits(model, ids)
    keys = list(model.state_dict())
    routed = compose(model, library, Spectr(top_k=1))
    steps = {
        "allow": lambda: routed.allow(["cats"]),
        "none": lambda: routed.allow(None),
        "add": lambda: routed.add("eels", root / "extra" / "eels"),
        "discard": lambda: routed.discard("ants"),
    }
    for change in changes:
        steps[change]()
    assert routed.remove() is model
    assert identities(model) == objects
    assert [n for n, _ in model.named_parameters()] == names
    assert list(model.state_dict()) == keys
    assert torch.equal(logits(model, ids), out)
    assert routed.experts == ()
    assert not routed.layers


def test_composing_again_after_remove_is_composing_once(library, model):
    routed = compose(model, library, Spectr(top_k=2))
    first = weights(model)
    routed.remove()
    compose(model, library, Spectr(top_k=2))
    same(weights(model), first)


def test_modules_keep_their_order(library, model):
    plain = [name for name, _ in model.named_modules()]
    compose(model, library, Spectr(top_k=2))
    assert [name for name, _ in model.named_modules() if not name.endswith(".base")] == plain


def test_training_mode_is_that_of_the_layer(library, model):
    model.train()
    compose(model, library, Spectr(top_k=2))
    assert all(module.training for module in model.modules())
    model.eval()
    assert not any(module.training for module in model.modules())


# The state


def test_the_state_of_a_composed_model_is_that_of_its_base(library, model):
    before = {key: value.clone() for key, value in model.state_dict().items()}
    compose(model, library, Arrow(top_k=2))
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_saving_a_composed_model_saves_its_base(library, model, tmp_path):
    plain = logits(model, ids)
    compose(model, library, Spectr(top_k=2))
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again, ids), plain)
    assert set(load_file(tmp_path / "model.safetensors")) == set(again.state_dict())


@pytest.mark.parametrize("assign", [False, True])
def test_a_composed_model_loads_the_state_of_another_base(library, model, assign):
    compose(model, library, Spectr(top_k=2))
    other = tiny_llama(seed=1)
    state = copy.deepcopy(other.state_dict())
    result = model.load_state_dict(state, assign=assign)
    assert not result.missing_keys
    assert not result.unexpected_keys
    compose(other, library, Spectr(top_k=2))
    same(weights(model), weights(other))


def test_loading_a_damaged_state_names_the_keys_of_the_base(library, model):
    compose(model, library, Spectr(top_k=2))
    state = model.state_dict()
    state["strange"] = state.pop(f"{Q}.weight")
    with pytest.raises(RuntimeError, match=re.escape(Q)):
        model.load_state_dict(state)


# Odds and ends


def test_the_default_router_is_the_papers_score_of_four(library, model):
    assert compose(model, library).router == Spectr(score="spectral", top_k=4, weights="uniform", combine="outputs")


def test_progress_is_reported_layer_by_layer(library, model):
    told = []
    routed = compose(model, library, progress=lambda done, total: told.append((done, total)))
    count = len(routed.layers)
    assert told == [(n, count) for n in range(1, count + 1)]


def test_a_composed_model_is_itself_and_shows_its_experts(library, model):
    plain = type(model)
    routed = compose(model, library, Spectr(top_k=2))
    assert routed.model is model
    assert type(model) is plain
    assert "experts=4, ranks=[4], router=Spectr(" in repr(model)
    assert repr(routed).startswith("Routed(14 layers, experts ants, bees, cats, dogs, Spectr(")


def test_a_routed_layer_looks_like_its_base(library, model):
    base = model.get_submodule(UP)
    compose(model, library)
    layer = model.get_submodule(UP)
    assert layer.weight is base.weight
    assert layer.bias is base.bias
    assert (layer.in_features, layer.out_features) == (32, 48)


def test_a_tied_output_layer_can_be_routed(tmp_path):
    """Its weight is the embedding's; saving and loading keep that."""
    model = tiny_llama(tie_word_embeddings=True)
    plain = logits(model, ids)
    module_adapter(tmp_path / "experts" / "head", {"lm_head": (32, 61)})
    routed = compose(model, tmp_path / "experts", Spectr(top_k=1))
    delta = dense_deltas(tmp_path / "experts" / "head")["lm_head"]
    with torch.no_grad():
        hidden = model.model(ids).last_hidden_state.double()
    close(logits(model, ids).double(), plain.double() + hidden @ delta.T)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(type(model).from_pretrained(tmp_path / "saved").eval(), ids), plain)
    assert torch.equal(logits(routed.remove(), ids), plain)


def test_a_model_of_two_dimensional_inputs_can_be_routed(tmp_path):
    """Any module with linear layers, whatever it is."""
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    module_adapter(tmp_path / "one", {"0": (8, 6), "2": (6, 3)}, rank=2)
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    deltas = dense_deltas(tmp_path / "one")
    hidden = (model[0](x).double() + x.double() @ deltas["0"].T).relu()
    expected = hidden @ (model[2].weight.double() + deltas["2"]).T + model[2].bias.double()
    compose(model, tmp_path, Spectr(top_k=1))
    close(model(x).double().detach(), expected.detach())


def test_generation_goes_on_after_every_change(library, model):
    plain = greedy(model, ids)
    routed = compose(model, library, Spectr(top_k=2))
    assert greedy(model, ids).shape == plain.shape
    routed.allow(["ants"])
    alone = greedy(model, ids)
    assert torch.equal(alone, greedy(composed(library, Oracle(expert="ants"))[0], ids))
    routed.remove()
    assert torch.equal(greedy(model, ids), plain)


def test_build_gives_the_same_model_for_the_same_seed():
    one, other = tiny_llama(), build(type(tiny_llama()), tiny_llama().config)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
