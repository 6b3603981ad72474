"""What composing refuses; every refusal leaves everything as it was."""

from __future__ import annotations

import pytest
import torch
from composing import RANKS, UP, Q, folders, module_adapter, unharmed
from safetensors.torch import load_file, save_file

from models import (
    peft_adapter,
)
from spectr import Arrow, ExpertLibrary, Oracle, Spectr, Uniform, compose
from spectr.errors import AdapterError, CompositionError, LibraryError


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
    unharmed(model, lambda: compose(model, library, router), CompositionError, "is not a router\n(.|\n)*get_router")


def test_an_adapter_for_layers_of_other_sizes_is_refused(model, tmp_path):
    module_adapter(tmp_path / "big", {Q: (64, 64)}, base_model_name_or_path="org/big-7b")
    library = ExpertLibrary.open(tmp_path)
    error = unharmed(model, lambda: compose(model, library, Spectr(top_k=1)), CompositionError, "the sizes of")
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
    for fault in ("'ants' does not fit the sizes of", "'ants' adapts model.norm", "'bees' adapts nowhere"):
        assert fault in str(error)
    assert "unequal ranks" in str(error)


def test_experts_with_the_same_fault_are_named_together(model, tmp_path):
    for name in ("ants", "bees", "cats"):
        module_adapter(tmp_path / name, {"nowhere.q_proj": (32, 32)}, rank=2)
    library = ExpertLibrary.open(tmp_path)
    error = unharmed(model, lambda: compose(model, library, Spectr(top_k=1)), CompositionError, "each adapts nowhere")
    assert str(error).startswith("experts ants, bees, cats: each adapts")


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
    unharmed(model, lambda: routed.allow(["ants"]), CompositionError, "needs one of cats, but none is allowed")
    unharmed(model, lambda: routed.discard("cats"), CompositionError, "oracle's expert 'cats' is not in the library")
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
    unharmed(model, lambda: routed.add("ants", root / "equal" / "bees"), LibraryError, "'ants' already exists")
    unharmed(model, lambda: routed.add("big", tmp_path / "big"), CompositionError, "the sizes of")
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
