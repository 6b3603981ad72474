"""Experts whose updates depend on the base model, calibrated, indexed and read from disk."""

import pytest

from beyond_lora import moved_adapter
from models import close, logits, peft_adapter
from scaling import PROMPTS, TEXTS, ids_of, listed, routed_model
from spectr import ExpertLibrary, Oracle, Shortlist, Spectr, build_index, calibrate
from spectr.errors import CompositionError
from text_model import make_model, make_tokenizer


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    root = tmp_path_factory.mktemp("kinds")
    moved_adapter(make_model(), root / "ants", 1, use_dora=True)
    moved_adapter(make_model(), root / "bees", 2, init_lora_weights="pissa")
    moved_adapter(make_model(), root / "cats", 3, lora_bias=True)
    peft_adapter(make_model(), root / "dogs", 4, targets=["q_proj", "v_proj"])
    plain = ExpertLibrary.open(root)
    known = plain.with_calibration(calibrate(make_model(), plain, make_tokenizer(), texts=TEXTS, null=0))
    return build_index(make_model(), known)


def test_the_listed_expert_is_what_it_is_in_memory(library):
    model, routed = routed_model(library, Shortlist(size=1))
    seen = set()
    for prompt in PROMPTS:
        found = logits(model, ids_of(prompt))
        [[name]] = listed(routed)
        seen.add(name)
        close(found, logits(routed_model(library, Oracle(expert=name))[0], ids_of(prompt)), 1e-4)
    assert seen


def test_each_is_loaded_from_disk_as_it_is_prepared_in_memory(library):
    _, routed = routed_model(library, Shortlist(size=2, token_router=Spectr(top_k=1)))
    whole, _ = routed_model(library, Spectr(top_k=1))
    for name in library.names:
        shares = routed.expert_cache.fetch((name,))[name]
        for module, share in shares.items():
            held = whole.get_submodule(module).stack().parts()[name]
            close((share.B @ share.A), (held.B @ held.A), 1e-4)
            for mine, theirs in ((share.gain_O, held.gain_O), (share.shift_O, held.shift_O)):
                assert (mine is None) == (theirs is None or not theirs.any())
                if mine is not None:
                    close(mine, theirs)


def test_a_list_whose_products_are_combined_refuses_more(library):
    router = Shortlist(size=2, token_router=Spectr(top_k=2, combine="ties"))
    with pytest.raises(CompositionError, match="merges products of factors"):
        routed_model(library, router)
