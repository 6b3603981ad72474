"""Composing on a tiny Llama: invariances, changes while it lives, and the way back."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from models import (
    build,
    close,
    dense_deltas,
    greedy,
    identities,
    logits,
    peft_adapter,
    peft_library,
    random_factors,
    tiny_llama,
    tokens,
    types_unchecked,
    write_adapter,
)
from spectr import Arrow, ExpertLibrary, Oracle, RoutedLinear, Spectr, Uniform, compose
from spectr.errors import AdapterError, CompositionError, LibraryError

RANKS = {"ants": 4, "bees": 4, "cats": 4, "dogs": 4}
UNEQUAL = {"ants": 2, "bees": 4, "cats": 8, "dogs": 3}
Q, V, UP = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj", "model.layers.1.mlp.up_proj"
ROUTERS = [Spectr(top_k=2), Spectr(top_k=2, weights="softmax"), Arrow(top_k=2), Uniform(), Oracle(expert="cats")]
ROUTERS += [Spectr(top_k=2, score="projection", combine="factors")]
ids = tokens(batch=3, length=8)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Adapters of one rank, one folder each, and an unrelated one beside them."""
    root = tmp_path_factory.mktemp("adapters")
    peft_library(tiny_llama(), root / "equal", RANKS)
    peft_library(tiny_llama(), root / "unequal", UNEQUAL)
    peft_adapter(tiny_llama(), root / "extra" / "eels", seed=99, rank=4)
    # partial: ants everywhere, bees in attention, cats in one module, and nobody in layer 1's down_proj
    everywhere = r".*layers\.0\..*_proj|.*layers\.1\.(self_attn\.._proj|mlp\.(up|gate)_proj)"
    peft_adapter(tiny_llama(), root / "partial" / "ants", seed=1, targets=everywhere)
    peft_adapter(tiny_llama(), root / "partial" / "bees", seed=2, targets=["q_proj", "v_proj"])
    peft_adapter(tiny_llama(), root / "partial" / "cats", seed=3, targets=r".*layers\.0\.self_attn\.q_proj")
    return root


@pytest.fixture
def library(root):
    return ExpertLibrary.open(root / "equal")


@pytest.fixture
def model():
    return tiny_llama()


def folders(root, *names):
    return {name: root / "equal" / name for name in names}


def weights(model):
    """Every layer's weights, by layer and expert, of the batch ``ids``; and the logits."""
    seen, handles = {}, []
    for name, layer in model.named_modules():
        if isinstance(layer, RoutedLinear):
            handles.append(layer.register_forward_pre_hook(lambda m, x, name=name: seen.update({name: (m, x[0])})))
    out = logits(model, ids)
    for handle in handles:
        handle.remove()
    with torch.no_grad():
        table = {
            name: dict(zip(layer.experts, layer.route(x).weights_TE.unbind(-1), strict=True))
            for name, (layer, x) in seen.items()
        }
    return table, out


def same(one, other):
    (table, out), (other_table, other_out) = one, other
    assert {n: set(w) for n, w in table.items()} == {n: set(w) for n, w in other_table.items()}
    for name, by_expert in table.items():
        for expert, weight in by_expert.items():
            assert torch.equal(weight, other_table[name][expert]), (name, expert)
    assert torch.equal(out, other_out)


def composed(library, router):
    model = tiny_llama()
    return model, compose(model, library, router)


# Invariances


@pytest.mark.parametrize("router", ROUTERS, ids=repr)
def test_the_order_in_which_experts_are_given_changes_nothing(root, router):
    one, _ = composed(ExpertLibrary.from_adapters(folders(root, *RANKS)), router)
    other, _ = composed(ExpertLibrary.from_adapters(folders(root, *reversed(RANKS))), router)
    same(weights(one), weights(other))


@pytest.mark.parametrize("router", ROUTERS, ids=repr)
def test_a_batch_is_routed_like_its_members_one_by_one(library, router):
    model, _ = composed(library, router)
    table, out = weights(model)
    for b in range(len(ids)):
        alone = logits(model, ids[b : b + 1])
        close(alone[0], out[b])
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


# Refusals: all of them leave everything as it was


def unharmed(model, act, error, match):
    before, out = identities(model), logits(model, ids)
    with types_unchecked(), pytest.raises(error) as caught:
        act()
    assert re.search(match, str(caught.value)), str(caught.value)
    assert identities(model) == before
    assert torch.equal(logits(model, ids), out)
    return caught.value


def module_adapter(folder, shapes, rank=4, **config):
    """A hand-written adapter for modules given as ``{name: (inputs, outputs)}``."""
    factors = {
        name: random_factors(rank, inputs, outputs, seed)
        for seed, (name, (inputs, outputs)) in enumerate(shapes.items())
    }
    return write_adapter(folder, factors, **config)


def test_composing_twice_is_refused(library, model):
    routed = compose(model, library, Spectr(top_k=2))
    unharmed(
        model, lambda: compose(model, library, Uniform()), CompositionError, "composed already\n  to do: call remove"
    )
    assert routed.experts == tuple(RANKS)


@pytest.mark.parametrize("make", [Spectr, Arrow])
def test_more_experts_than_there_are_cannot_be_chosen(library, model, make):
    error = unharmed(model, lambda: compose(model, library, make(top_k=5)), CompositionError, "^top_k=5, but")
    assert error.given == "top_k=5, but the library has 4 experts"
    assert error.expected == "top_k from 1 to 4"


def test_the_oracles_expert_has_to_be_there(library, model):
    error = unharmed(
        model, lambda: compose(model, library, Oracle(expert="cat")), CompositionError, "oracle's expert 'cat'"
    )
    assert error.do == "did you mean 'cats'? known: ants, bees, cats, dogs"


@pytest.mark.parametrize("router", ["spectr", 3])
def test_what_is_no_router_is_refused(library, model, router):
    unharmed(model, lambda: compose(model, library, router), CompositionError, "is no router\n(.|\n)*get_router")


def test_an_adapter_for_layers_of_other_sizes_is_refused(model, tmp_path):
    module_adapter(tmp_path / "big", {Q: (64, 64)}, base_model_name_or_path="org/big-7b")
    library = ExpertLibrary.open(tmp_path)
    error = unharmed(model, lambda: compose(model, library, Spectr(top_k=1)), CompositionError, "other sizes")
    assert f"{Q} (64 -> 64, here 32 -> 32)" in error.given
    assert "org/big-7b" in error.expected


def test_modules_that_do_not_exist_are_refused(model, tmp_path):
    module_adapter(tmp_path / "gpt", {f"transformer.h.{n}.mlp.up_proj": (32, 48) for n in range(5)})
    library = ExpertLibrary.open(tmp_path)
    error = unharmed(model, lambda: compose(model, library, Spectr(top_k=1)), CompositionError, "does not have")
    assert "transformer.h.0.mlp.up_proj" in error.given
    assert "and 2 more modules" in error.given
    assert "model.layers.0.mlp.up_proj" in error.expected


@pytest.mark.parametrize("module", ["model.embed_tokens", "model.norm", "model.layers.0", "model.layers.1.mlp"])
def test_modules_that_are_not_linear_are_refused(model, tmp_path, module):
    module_adapter(tmp_path / "odd", {module: (32, 32)})
    library = ExpertLibrary.open(tmp_path)
    error = unharmed(model, lambda: compose(model, library, Spectr(top_k=1)), CompositionError, "not linear layers")
    assert f"{module} ({type(model.get_submodule(module)).__name__})" in error.given


def test_factors_of_unequal_ranks_cannot_be_merged(root, model):
    router = Spectr(top_k=2, combine="factors")
    library = ExpertLibrary.open(root / "unequal")
    error = unharmed(model, lambda: compose(model, library, router), CompositionError, "unequal ranks")
    assert "ants 2, bees 4, cats 8, dogs 3" in error.given
    assert "combine='outputs'" in error.do


def test_equal_ranks_are_asked_for_layer_by_layer(model, tmp_path):
    """Two experts of different ranks that never meet can be merged."""
    module_adapter(tmp_path / "ants", {Q: (32, 32)}, rank=2)
    module_adapter(tmp_path / "bees", {UP: (32, 48)}, rank=4)
    routed = compose(model, tmp_path, Spectr(top_k=1, combine="factors"))
    assert set(routed.layers) == {Q, UP}


def test_all_faults_of_all_experts_come_in_one_error(model, tmp_path):
    module_adapter(tmp_path / "ants", {Q: (64, 32), "model.norm": (32, 32)})
    module_adapter(tmp_path / "bees", {"nowhere.q_proj": (32, 32)}, rank=2)
    module_adapter(tmp_path / "cats", {Q: (32, 32)}, rank=2)
    library = ExpertLibrary.open(tmp_path)
    router = Spectr(top_k=1, combine="factors")
    error = unharmed(model, lambda: compose(model, library, router), CompositionError, "do not fit this model: 4")
    for fault in ("'ants' was made for layers of other sizes", "'ants' adapts model.norm", "'bees' adapts nowhere"):
        assert fault in str(error)
    assert "unequal ranks" in str(error)


def test_an_empty_allow_list_is_refused(library, model):
    routed = compose(model, library, Spectr(top_k=2))
    unharmed(model, lambda: routed.allow([]), CompositionError, "allow-list is empty(.|\n)*allow\\(None\\)")
    assert routed.experts == tuple(RANKS)


def test_unknown_experts_are_refused_all_at_once(library, model):
    routed = compose(model, library, Spectr(top_k=2))
    error = unharmed(model, lambda: routed.allow(["ant", "cats", "zzz"]), LibraryError, "unknown experts: 2 problems")
    assert "unknown expert 'ant'\n  to do: did you mean 'ants'? known: ants, bees, cats, dogs" in str(error)
    assert "unknown expert 'zzz'" in str(error)
    unharmed(model, lambda: routed.discard("dog"), LibraryError, "did you mean 'dogs'")
    assert routed.allow(None).experts == tuple(RANKS)


def test_an_oracle_without_its_expert_is_refused(library, model):
    routed = compose(model, library, Oracle(expert="cats"))
    unharmed(model, lambda: routed.allow(["ants"]), CompositionError, "needs cats, of which none is allowed")
    unharmed(model, lambda: routed.discard("cats"), CompositionError, "oracle's expert 'cats' is not there")
    assert routed.experts == ("cats",)


def test_the_last_expert_cannot_be_discarded(root, model):
    routed = compose(model, ExpertLibrary.from_adapters(folders(root, "ants")), Spectr(top_k=1))
    unharmed(model, lambda: routed.discard("ants"), CompositionError, "last expert\n  to do: call remove")
    assert routed.library.names == ("ants",)


def test_the_last_allowed_expert_cannot_be_discarded(library, model):
    routed = compose(model, library, Spectr(top_k=1)).allow(["ants"])
    unharmed(model, lambda: routed.discard("ants"), CompositionError, "last expert")
    assert routed.allow(None).experts == tuple(RANKS)


def test_discarding_below_top_k_is_refused(root, model):
    routed = compose(model, ExpertLibrary.from_adapters(folders(root, "ants", "bees")), Spectr(top_k=2))
    unharmed(model, lambda: routed.discard("ants"), CompositionError, "top_k=2, but the library has 1 expert\n")
    assert routed.experts == ("ants", "bees")


def test_adding_what_is_there_or_does_not_fit_is_refused(root, library, model, tmp_path):
    routed = compose(model, library, Spectr(top_k=2))
    module_adapter(tmp_path / "big", {Q: (64, 64)})
    unharmed(model, lambda: routed.add("ants", root / "equal" / "bees"), LibraryError, "already is an expert 'ants'")
    unharmed(model, lambda: routed.add("big", tmp_path / "big"), CompositionError, "other sizes")
    unharmed(model, lambda: routed.add("gone", tmp_path / "gone"), AdapterError, "there is no folder")
    assert routed.experts == routed.library.names == tuple(RANKS)


@pytest.mark.parametrize("step", ["compose", "add"])
def test_weights_that_went_bad_since_the_library_was_opened_are_refused(root, model, tmp_path, step):
    """Found in the last module, after others were prepared."""
    healthy = peft_adapter(model, tmp_path / "sick", seed=5)
    experts = {**folders(root, "ants", "bees"), "sick": healthy}
    library = ExpertLibrary.from_adapters(experts)
    weights_file = healthy / "adapter_model.safetensors"
    tensors = load_file(weights_file)
    tensors[sorted(tensors)[-1]][0, 0] = torch.nan
    save_file(tensors, weights_file)
    if step == "compose":
        unharmed(model, lambda: compose(model, library, Spectr(top_k=2)), AdapterError, "'sick'.*NaN")
    else:
        routed = compose(model, ExpertLibrary.from_adapters(folders(root, "ants", "bees")), Spectr(top_k=2))
        unharmed(model, lambda: routed.add("sick", healthy), AdapterError, "'sick'.*NaN")


def test_a_missing_library_is_refused(model, tmp_path):
    unharmed(model, lambda: compose(model, tmp_path / "none"), LibraryError, "there is no library folder")


# Odds and ends


def test_the_default_router_is_the_papers_score_of_four(library, model):
    assert compose(model, library).router == Spectr(score="spectral", top_k=4, weights="uniform", combine="outputs")


def test_progress_is_told_layer_by_layer(library, model):
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
