"""Trained modules, rows and factors of embeddings, compared with PEFT: one expert alone, and rows with one each."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from peft import LoraConfig, TrainableTokensConfig, get_peft_model

import spectr
from adapters_on_disk import of_others
from models import TEXT, TOKENS, VOCAB, build, close as closer, greedy, identities, tiny_llama, tokens, types_unchecked
from spectr.errors import AdapterError, CompositionError
from spectr.layers.saved_module import SavedModule
from spectr.routers import HoldWeights, KeepShortlist, PromptPolicy
from trained_modules import ROWS, ByFirst, as_peft, gemma, gpt2, library_of, llama_classifier, moved, out, roberta, t5

Q = ["q_proj"]
ids = tokens(batch=4, length=8)


def tied(**changes):
    return tiny_llama(tie_word_embeddings=True, **changes)


CASES = {
    "lm_head": (tiny_llama, LoraConfig(target_modules=Q, modules_to_save=["lm_head"])),
    "embedding": (tiny_llama, LoraConfig(target_modules=Q, modules_to_save=["embed_tokens"])),
    "norms": (tiny_llama, LoraConfig(target_modules=Q, modules_to_save=["norm", "layernorm"])),
    "an embedding tied before": (tied, LoraConfig(target_modules=Q, modules_to_save=["embed_tokens"])),
    "a tied embedding": (
        tied,
        LoraConfig(target_modules=Q, modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    ),
    "LoRA of an embedding": (tiny_llama, LoraConfig(target_modules=[*Q, "embed_tokens"], r=4)),
    "LoRA of a tied one": (tied, LoraConfig(target_modules=[*Q, "embed_tokens"], r=4)),
    "LoRA of both": (tied, LoraConfig(target_modules=[*Q, "embed_tokens"], r=4, ensure_weight_tying=True)),
    "LoRA of a scaled one": (gemma, LoraConfig(target_modules=[*Q, "embed_tokens"], r=4)),
    "LoRA of the head": (tiny_llama, LoraConfig(target_modules=[*Q, "lm_head"], r=4)),
    "tokens": (tiny_llama, LoraConfig(target_modules=Q, trainable_token_indices=[9, 4, 30])),
    "tied tokens": (tied, LoraConfig(target_modules=Q, trainable_token_indices=[9, 4, 30])),
    "scaled tokens": (gemma, LoraConfig(target_modules=Q, trainable_token_indices=[9, 4, 30])),
    "tokens by name": (
        tied,
        LoraConfig(target_modules=Q, trainable_token_indices={"embed_tokens": [9, 4, 30], "lm_head": [5]}),
    ),
    "tokens alone": (tied, TrainableTokensConfig(token_indices=[9, 4, 30])),
    "a pooled head": (llama_classifier, LoraConfig(target_modules=Q, task_type="SEQ_CLS")),
    "a head of two layers": (roberta, LoraConfig(target_modules=["query"], task_type="SEQ_CLS")),
    "a head of tokens": (
        lambda: roberta("RobertaForTokenClassification"),
        LoraConfig(target_modules=["query"], task_type="TOKEN_CLS"),
    ),
    "biases": (lambda: roberta("RobertaForMaskedLM"), LoraConfig(target_modules=["query"], bias="all")),
    "biases of norms": (gpt2, LoraConfig(target_modules=["c_attn"], bias="all", fan_in_fan_out=True)),
    "biases of Conv1D": (gpt2, LoraConfig(target_modules=["c_attn"], modules_to_save=["c_proj"], fan_in_fan_out=True)),
    "positions": (gpt2, LoraConfig(target_modules=["c_attn"], modules_to_save=["wpe"], fan_in_fan_out=True)),
    "T5": (t5, LoraConfig(target_modules=["q"], trainable_token_indices=[9, 4, 30])),
}


def close(ours, theirs):
    closer(ours, theirs, 1e-4)


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request, tmp_path):
    make, config = request.param
    model = make()
    library, folders = library_of(model, tmp_path, config)
    return model, library, folders


def test_one_expert_is_what_peft_makes_of_it_and_removing_it_gives_the_model_back(case):
    model, library, folders = case
    before, plain = identities(model), out(model, ids)
    theirs = out(as_peft(model, folders["ants"]), ids)
    assert (theirs - plain).abs().max() > 0.05 * plain.abs().max()
    routed = spectr.compose(model, library, spectr.Oracle(expert="ants"))
    close(out(model, ids), theirs)
    routed.remove()
    assert identities(model) == before
    assert torch.equal(out(model, ids), plain)


def test_rows_of_a_batch_hold_an_expert_each_or_none(case):
    model, library, folders = case
    peers = [out(as_peft(model, folders[name]), ids) for name in ("ants", "bees")]
    plain = out(model, ids)
    routed = spectr.compose(model, library, ROWS)
    close(out(model, ids), torch.stack([peers[row[0] % 2][n] for n, row in enumerate(ids.tolist())]))
    with routed.prompt.using(torch.tensor([[0.0, 1.0], [0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])):
        close(out(model, ids), torch.stack([peers[1][0], plain[1], peers[0][2], peers[1][3]]))


@pytest.mark.parametrize("changes", [{"target_modules": Q}, {"exclude_modules": ["embed_tokens"]}])
def test_factors_of_an_embedding_that_is_not_targeted_are_left_out(tmp_path, changes):
    model, (_, config) = tiny_llama(), CASES["LoRA of an embedding"]
    _, folders = library_of(model, tmp_path, config)
    file = folders["ants"] / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    theirs = out(as_peft(model, folders["ants"]), ids)
    library = spectr.ExpertLibrary.from_adapters({"ants": folders["ants"]})
    routed = spectr.compose(model, library, spectr.Oracle(expert="ants"))
    close(out(model, ids), theirs)
    assert "model.embed_tokens" in routed.library["ants"].left_out


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_pooled_head_takes_each_rows_last_token(tmp_path, side):
    model, config = llama_classifier(), CASES["a pooled head"][1]
    library, folders = library_of(model, tmp_path, config)
    padded, mask = ids.clone(), torch.ones_like(ids)
    for row, pad in ((1, 3), (2, 1)):
        where = slice(0, pad) if side == "left" else slice(8 - pad, 8)
        padded[row, where], mask[row, where] = 0, 0
    peers = [out(as_peft(model, folders[name]), padded, attention_mask=mask) for name in ("ants", "bees")]
    routed = spectr.compose(model, library, ROWS)
    with routed.prompt.using(torch.eye(2)[[0, 1, 0, 1]]):
        close(out(model, padded, attention_mask=mask), torch.stack([peers[n % 2][n] for n in range(4)]))


def test_a_classifier_is_calibrated_on_texts_that_are_given(tmp_path):
    from text_model import make_tokenizer

    model = llama_classifier()
    library, folders = library_of(model, tmp_path, CASES["a pooled head"][1])
    with types_unchecked(), pytest.raises(CompositionError, match="LlamaForSequenceClassification cannot write texts"):
        spectr.calibrate(model, library, make_tokenizer())
    routed = spectr.compose(model, calibrated(model, library), spectr.Calibrated())
    chosen = routed.prompt.decide(input_ids=ids).argmax(-1).tolist()
    peers = [out(as_peft(llama_classifier(), folders[name]), ids) for name in ("ants", "bees")]
    close(out(model, ids), torch.stack([peers[name][n] for n, name in enumerate(chosen)]))


@pytest.mark.parametrize("name", ["lm_head", "tied tokens", "LoRA of both", "norms"])
@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"num_beams": 2}])
def test_generations_of_a_batch_are_those_of_peft(tmp_path, name, options):
    make, config = CASES[name]
    model = make()
    library, folders = library_of(model, tmp_path, config)
    with of_others():
        peers = [as_peft(model, folders[name]) for name in ("ants", "bees")]
        theirs = [greedy(peers[row[0] % 2], ids[n : n + 1], **options)[0] for n, row in enumerate(ids.tolist())]
    spectr.compose(model, library, ROWS)
    assert torch.equal(greedy(model, ids, **options), torch.stack(theirs))


def test_allowing_one_expert_is_its_own_model_under_any_router(tmp_path):
    model = tiny_llama()
    library, folders = library_of(model, tmp_path, CASES["lm_head"][1])
    routed = spectr.compose(model, library, ROWS)
    routed.allow(["bees"])
    close(out(model, ids), out(as_peft(tiny_llama(), folders["bees"]), ids))
    routed.allow(None)
    routed.discard("bees")
    close(out(model, ids), out(as_peft(tiny_llama(), folders["ants"]), ids))
    routed.remove()
    alone = library.without("bees")
    routed = spectr.compose(model, alone, spectr.Spectr(top_k=1))
    close(out(model, ids), out(as_peft(tiny_llama(), folders["ants"]), ids))
    with types_unchecked(), pytest.raises(CompositionError, match=r"mixes experts, and such modules cannot be mixed"):
        routed.add("bees", folders["bees"])
    close(out(model, ids), out(as_peft(tiny_llama(), folders["ants"]), ids))


def test_a_shortlist_of_one_holds_that_expert(tmp_path):
    model = tiny_llama()
    library, folders = library_of(model, tmp_path, CASES["lm_head"][1])
    peers = [out(as_peft(model, folders[name]), ids) for name in ("ants", "bees")]
    policy = PromptPolicy(evidence=ByFirst(), use=KeepShortlist(size=1), router=spectr.Spectr(top_k=1))
    spectr.compose(model, library, policy)
    close(out(model, ids), torch.stack([peers[row[0] % 2][n] for n, row in enumerate(ids.tolist())]))


MIXING = [
    spectr.Spectr(top_k=2),
    spectr.Uniform(),
    PromptPolicy(evidence=ByFirst(), use=HoldWeights(top_k=2), router=spectr.Spectr(top_k=1)),
]


def test_one_expert_may_adapt_what_another_has_trained_whole(tmp_path):
    model = tiny_llama()
    whole, factors = CASES["lm_head"][1], LoraConfig(target_modules=["lm_head"], r=4)
    folders = {"ants": moved(model, tmp_path / "ants", whole, 1), "bees": moved(model, tmp_path / "bees", factors, 2)}
    peers = [out(as_peft(model, folder), ids) for folder in folders.values()]
    before, plain = identities(model), out(model, ids)
    routed = spectr.compose(model, spectr.ExpertLibrary.from_adapters(folders), ROWS)
    close(out(model, ids), torch.stack([peers[row[0] % 2][n] for n, row in enumerate(ids.tolist())]))
    for name, theirs in zip(("ants", "bees"), peers, strict=True):
        routed.allow([name])
        close(out(model, ids), theirs)
    routed.allow(None)
    routed.remove()
    assert identities(model) == before
    assert torch.equal(out(model, ids), plain)


def test_a_model_whose_weights_accelerate_keeps_elsewhere_is_composed_or_refused(tmp_path):
    from accelerate import cpu_offload

    library, folders = library_of(tiny_llama(), tmp_path, CASES["tokens"][1])
    model = cpu_offload(tiny_llama(), execution_device=torch.device("cpu"))
    spectr.compose(model, library, spectr.Oracle(expert="ants"))
    close(out(model, ids), out(as_peft(tiny_llama(), folders["ants"]), ids))


@pytest.mark.parametrize(
    "router", [spectr.Calibrated(), spectr.Spectr(top_k=2)], ids=lambda router: type(router).__name__
)
def test_experts_without_factors_are_refused_where_these_are_chosen_by(tmp_path, router):
    model = tied()
    library, _ = library_of(model, tmp_path, CASES["tokens alone"][1])
    if router.policy is not None:
        library = calibrated(model, library)
    with (
        types_unchecked(),
        pytest.raises(CompositionError, match=r"ants, bees have no LoRA factors, and .* chooses by"),
    ):
        spectr.compose(model, library, router)


def calibrated(model, library):
    from text_model import make_tokenizer

    return library.with_calibration(spectr.calibrate(model, library, make_tokenizer(), texts=["the sky is", "who is"]))


@pytest.mark.parametrize("router", MIXING, ids=lambda router: type(router).__name__)
def test_routers_that_mix_experts_are_refused_by_name(tmp_path, router):
    model = tiny_llama()
    library, _ = library_of(model, tmp_path, CASES["lm_head"][1])
    before = identities(model)
    with types_unchecked(), pytest.raises(CompositionError) as caught:
        spectr.compose(model, library, router)
    assert "ants, bees have trained lm_head" in caught.value.given
    assert "Calibrated() or Oracle(expert=...)" in str(caught.value.expected)
    assert "a library of 'ants' alone" in str(caught.value.do)
    assert identities(model) == before


def test_a_verdict_that_mixes_experts_with_trained_modules_is_refused(tmp_path):
    model = tiny_llama()
    library, _ = library_of(model, tmp_path, CASES["lm_head"][1])
    routed = spectr.compose(model, library, ROWS)
    for weights in ([0.5, 0.5], [0.5, 0.0]):
        with (
            routed.prompt.using(torch.tensor([weights])),
            types_unchecked(),
            pytest.raises(CompositionError, match="a row mixes experts, or uses a part of one"),
        ):
            out(model, ids)


def test_copies_of_the_base_models_own_weights_are_left_alone_and_any_router_takes_them(tmp_path):
    model = tied()
    with of_others():
        for name in ("ants", "bees"):
            wrapped = get_peft_model(copy.deepcopy(model), LoraConfig(target_modules=[*Q, "lm_head"]))
            wrapped.save_pretrained(tmp_path / name, save_embedding_layers=True)
    library = spectr.ExpertLibrary.open(tmp_path)
    assert "lm_head" in library["ants"].saved
    spectr.compose(model, library, spectr.Spectr(top_k=2))
    assert not any(isinstance(module, SavedModule) for module in model.modules())


def test_other_weights_of_a_tied_embedding_reach_the_head_as_when_peft_loads_them(tmp_path):
    model = tied()
    with of_others():
        wrapped = get_peft_model(copy.deepcopy(model), LoraConfig(target_modules=Q))
        with torch.no_grad():
            wrapped.get_input_embeddings().weight.mul_(1.5)
        wrapped.save_pretrained(tmp_path / "ants", save_embedding_layers=True)
    library = spectr.ExpertLibrary.open(tmp_path)
    theirs = out(as_peft(model, tmp_path / "ants"), ids)
    assert not torch.equal(theirs, out(model, ids))
    spectr.compose(model, library, spectr.Oracle(expert="ants"))
    close(out(model, ids), theirs)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_compute_the_same(tmp_path, copied):
    model = tied()
    library, _ = library_of(model, tmp_path, CASES["tied tokens"][1])
    keys = list(model.state_dict())
    routed = spectr.compose(model, library, spectr.Oracle(expert="ants"))
    other = copied(model)
    before = out(model, ids)
    routed.remove()
    assert torch.equal(out(other, ids), before)
    assert list(other.state_dict()) == keys


@pytest.mark.parametrize("name", ["tied tokens", "LoRA of an embedding", "lm_head", "norms"])
def test_casting_a_composed_model_is_composing_a_cast_one(tmp_path, name):
    make, config = CASES[name]
    library, _ = library_of(make(), tmp_path, config)
    model, other = make(), make().to(torch.bfloat16)
    spectr.compose(model, library, spectr.Oracle(expert="ants"))
    model.to(torch.bfloat16)
    spectr.compose(other, library, spectr.Oracle(expert="ants"))
    assert torch.equal(out(model, ids), out(other, ids))


def test_loading_other_weights_into_a_composed_model_leaves_the_experts_theirs(tmp_path):
    model = tiny_llama()
    library, folders = library_of(model, tmp_path, CASES["tokens"][1])
    spectr.compose(model, library, spectr.Oracle(expert="ants"))
    model.load_state_dict(tiny_llama(seed=1).state_dict(), assign=True)
    close(out(model, ids), out(as_peft(tiny_llama(seed=1), folders["ants"]), ids))


def test_a_saved_model_is_the_same_when_it_is_loaded(tmp_path):
    from text_model import make_tokenizer

    model = tiny_llama()
    library, _ = library_of(model, tmp_path / "experts", CASES["lm_head"][1])
    routed = spectr.compose(model, library, spectr.Oracle(expert="ants"))
    spectr.save_composed(routed, make_tokenizer(), tmp_path / "folder")
    again, _ = spectr.load_composed(tmp_path / "folder", dtype="float32")
    assert torch.equal(out(again.model, ids), out(model, ids))


def test_a_composed_model_is_one_graph(tmp_path):
    model = tied(num_hidden_layers=1)
    library, _ = library_of(model, tmp_path, CASES["tied tokens"][1])
    spectr.compose(model, library, spectr.Oracle(expert="ants"))
    before = out(model, ids)
    with types_unchecked():
        torch._dynamo.reset()
        close(out(torch.compile(model, fullgraph=True, backend="eager"), ids), before)
        torch._dynamo.reset()


UNFIT = {
    "no such head": (llama_classifier, tiny_llama, "a pooled head", "adapts score that this model does not have"),
    "another number of labels": (
        llama_classifier,
        lambda: llama_classifier(labels=5),
        "a pooled head",
        r"score \(weight of shape \(3, 32\), here \(5, 32\)\)",
    ),
    "a larger vocabulary": (
        tiny_llama,
        lambda: tiny_llama(vocab_size=VOCAB + 3),
        "LoRA of an embedding",
        r"model.embed_tokens \(an embedding of 61 tokens and 32 features, here \(64, 32\)\)",
    ),
    "fewer tokens": (
        tiny_llama,
        lambda: tiny_llama(vocab_size=20),
        "tokens",
        r"model.embed_tokens \(trained rows up to 30 of 32 features, here \(20, 32\)\)",
    ),
}


@pytest.mark.parametrize(("trained", "given", "name", "match"), UNFIT.values(), ids=UNFIT.keys())
def test_what_does_not_fit_the_model_is_refused(tmp_path, trained, given, name, match):
    library, _ = library_of(trained(), tmp_path, CASES[name][1])
    with types_unchecked(), pytest.raises(CompositionError, match=match):
        spectr.compose(given(), library, spectr.Oracle(expert="ants"))


def test_a_trained_embedding_whose_weight_the_model_uses_by_itself_is_refused(tmp_path):
    from transformers import MobileBertConfig, MobileBertForMaskedLM

    sizes = {**TEXT, **TOKENS, "embedding_size": 16, "num_hidden_layers": 1, "intra_bottleneck_size": 32}
    model = build(MobileBertForMaskedLM, MobileBertConfig(**sizes))
    config = LoraConfig(target_modules=["query"], trainable_token_indices={"word_embeddings": [9, 4]})
    library, _ = library_of(model, tmp_path, config)
    with types_unchecked(), pytest.raises(CompositionError, match=r"word_embeddings, .*whose weights this model uses"):
        spectr.compose(model, library, spectr.Oracle(expert="ants"))


def test_infinite_numbers_are_refused(tmp_path):
    model = tiny_llama()
    model.lm_head.weight.data[0, 0] = torch.inf
    with types_unchecked(), pytest.raises(AdapterError, match=r"lm_head.weight holds NaN or infinite values"):
        library_of(model, tmp_path, CASES["lm_head"][1])
