"""Self-calibrated routing: the score, the decision for a prompt, and how it is held."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from calibrating import DOWN, PROMPTS, RANKS, TEXTS, Q, ids_of, inputs_of, inputs_of_texts, routed_model
from safetensors.torch import load_file, save_file

from models import build, close, dense_deltas, greedy, logits, peft_adapter, peft_library, types_unchecked
from spectr import Calibrated, ExpertLibrary, Oracle, Spectr, calibrate, compose, get_router, trace
from spectr.errors import CompositionError, DataError
from spectr.evaluation import choice_logprobs
from spectr.hashing import file_sha256
from spectr.library import Calibration
from spectr.models import encode_batch, encode_prompt
from spectr.spectral import reference
from spectr.tasks import Example
from text_model import make_model, make_tokenizer

# The score


@pytest.mark.parametrize("module", [Q, DOWN])
def test_the_score_is_that_of_the_reference(root, library, module):
    model, _ = routed_model(library)
    texts = inputs_of_texts(library, [module])[module]
    x = inputs_of(make_model(), [module], ids_of("is the grass blue"))[module]
    layer = model.get_submodule(module)
    scores_TE = layer.route(x.float()).scores_TE
    for number, name in enumerate(layer.experts):
        delta = dense_deltas(root / name)[module]
        slow = [reference.calibrated_score(delta, token, texts) for token in x]
        close(scores_TE[:, number].double(), torch.tensor(slow, dtype=torch.float64), 1e-4)


def test_the_update_itself_is_not_changed_by_the_calibration(library):
    model, _ = routed_model(library, level="token", top_k=3)
    plain, _ = routed_model(library, Spectr(top_k=3))
    close(logits(model, ids_of(PROMPTS[1])), logits(plain, ids_of(PROMPTS[1])))


def scaled(root, folder, name, factor):
    """A copy of an adapter whose update is ``factor`` times as large."""
    folder.mkdir()
    config = json.loads((root / name / "adapter_config.json").read_text())
    config["lora_alpha"] *= factor
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(load_file(root / name / "adapter_model.safetensors"), folder / "adapter_model.safetensors")
    return folder


def test_an_experts_size_buys_it_nothing(root, library, tmp_path):
    sources = {name: root / name for name in RANKS} | {"bees": scaled(root, tmp_path / "bees", "bees", 100)}
    loud = ExpertLibrary.from_adapters(sources)
    loud = loud.with_calibration(calibrate(make_model(), loud, make_tokenizer(), texts=TEXTS, null=0))
    batch = encode_batch(make_tokenizer(), PROMPTS)
    (_, plain), (_, louder) = (
        routed_model(library, top_k=3, weights="softmax"),
        routed_model(loud, top_k=3, weights="softmax"),
    )
    close(louder.prompt.decide(**batch), plain.prompt.decide(**batch), 1e-4)


# The decision


def weight(module):
    """Of a module in the mean over modules."""
    return 4 if module.endswith(("q_proj", "k_proj", "v_proj")) else 1


def slow_reading(root, library, prompt, tokens=None):
    """Each expert's weighted means over the modules of both numbers, of the tokens between the template's parts."""
    modules = list(dense_deltas(root / "ants"))
    texts = inputs_of_texts(library, modules)
    total = torch.zeros(2, len(RANKS), dtype=torch.float64)
    deltas = {name: dense_deltas(root / name) for name in RANKS}
    begin, closing = len(library.calibration.opening), len(library.calibration.closing)
    assert (begin, closing) == (1, 1)
    inputs = inputs_of(make_model(), modules, ids_of(prompt))
    for module in modules:
        used = inputs[module][begin:-closing][:tokens]
        scores = [
            [max(0.05, reference.calibrated_score(deltas[name][module], x, texts[module])) for name in RANKS]
            for x in used
        ]
        for number, (rows, power) in enumerate(((scores, 2.25), (map(reference.relative_scores, scores), 5.0))):
            columns = zip(*rows, strict=True)
            means_E = torch.tensor([reference.log_power_mean(list(column), power) for column in columns])
            total[number] += weight(module) * means_E
    return total / sum(map(weight, modules))


def slow_evidence(root, library, prompts, texts, tokens=None):
    """Prompts against these texts: the evidence for each expert, and how far the one that does so most stands out.

    A prompt that is one of the texts is compared with the others.
    """
    null = torch.stack([slow_reading(root, library, text, tokens) for text in texts])
    z = []
    for prompt in prompts:
        row = slow_reading(root, library, prompt, tokens)
        rest = null[[text != prompt for text in texts]]
        z.append(
            [[reference.standardised(float(v), rest[:, n, e].tolist()) for e, v in enumerate(row[n])] for n in (0, 1)]
        )
    z_B2E = torch.tensor(z, dtype=torch.float64)
    return z_B2E.mean(1), z_B2E[:, 1].amax(-1)


@pytest.mark.parametrize("tokens", [None, 4])
def test_the_decision_is_that_of_the_reference(root, library, tokens):
    _, routed = routed_model(library, top_k=3, weights="softmax", probe_tokens=tokens or 256)
    weights_BE = routed.prompt.decide(input_ids=ids_of(PROMPTS[1]))
    [slow], _ = slow_evidence(root, library, [PROMPTS[1]], TEXTS, tokens)
    close(weights_BE[0].double(), slow.softmax(0), 1e-3)


def test_the_share_of_ordinary_prompts_is_that_of_the_reference(root, library):
    tokenizer, null = make_tokenizer(), ["what is red", "a z", "the good sky is blue", "no no", "who", "x y z x y"]
    known = replace(library.calibration, null=[encode_prompt(tokenizer, text) for text in null])
    _, routed = routed_model(library.with_calibration(known), abstain=None)
    prompts = [*PROMPTS, "is the grass red or blue"]
    found = routed.prompt.read(**encode_batch(tokenizer, prompts))
    evidence_BE, largest_B = slow_evidence(root, library, prompts, null)
    _, null_K = slow_evidence(root, library, null, null)
    close(found.evidence_BE.double(), evidence_BE, 1e-3)
    slow_B = [(1 + sum(float(other) >= float(one) - 1e-5 for other in null_K)) / (1 + len(null)) for one in largest_B]
    assert found.p_B.tolist() == pytest.approx(slow_B)
    _, plain = routed_model(library, abstain=None)
    assert plain.prompt.read(**encode_batch(tokenizer, PROMPTS)).p_B is None  # the texts give the means, too


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_companions_change_no_decision(library, side):
    _, routed = routed_model(library, top_k=3, weights="softmax")
    rows = [encode_prompt(make_tokenizer(), prompt) for prompt in PROMPTS]
    width = max(map(len, rows))
    pads = [[2] * (width - len(row)) for row in rows]
    left = side == "left"
    ids = torch.tensor([pad + row if left else row + pad for row, pad in zip(rows, pads, strict=True)])
    mask = torch.tensor(
        [[0] * len(p) + [1] * len(r) if left else [1] * len(r) + [0] * len(p) for r, p in zip(rows, pads, strict=True)]
    )
    together = routed.prompt.decide(input_ids=ids, attention_mask=mask)
    for row, prompt in zip(together, PROMPTS, strict=True):
        close(row, routed.prompt.decide(input_ids=ids_of(prompt))[0])


def test_the_decision_holds_for_every_token_and_layer(library):
    model, routed = routed_model(library)
    batch = encode_batch(make_tokenizer(), PROMPTS)
    chosen_BE = routed.prompt.decide(**batch)
    with trace(model) as record:
        model(**batch)
    assert len(record.inputs) == 1
    for layer in record.values():
        assert torch.equal(layer.weights, chosen_BE[:, None].expand_as(layer.weights))


def test_with_one_expert_the_model_is_that_experts_own(library):
    model, routed = routed_model(library)
    for prompt in PROMPTS:
        [weights_E] = routed.prompt.decide(input_ids=ids_of(prompt))
        expert = routed.experts[int(weights_E.argmax())]
        alone, _ = routed_model(library, Oracle(expert=expert))
        close(logits(model, ids_of(prompt)), logits(alone, ids_of(prompt)))
        assert torch.equal(greedy(model, ids_of(prompt)), greedy(alone, ids_of(prompt)))
        assert torch.equal(greedy(model, ids_of(prompt), num_beams=2), greedy(alone, ids_of(prompt), num_beams=2))


def test_a_batch_serves_each_row_by_its_own_experts(library):
    model, _ = routed_model(library, top_k=2, weights="softmax")
    batch = encode_batch(make_tokenizer(), PROMPTS)
    together = model(**batch).logits
    for row, prompt in zip(together, PROMPTS, strict=True):
        ids = ids_of(prompt)
        close(row[-ids.shape[1] :], logits(model, ids)[0], 1e-4)


def test_a_call_that_goes_on_with_a_cache_keeps_the_decision_and_a_new_prompt_does_not(library):
    model, routed = routed_model(library, top_k=3, weights="softmax")
    cache = model(input_ids=ids_of(PROMPTS[0]), use_cache=True).past_key_values
    held = routed.prompt.weights_BE
    model(input_ids=ids_of("z z z z"), past_key_values=cache, use_cache=True)
    assert routed.prompt.weights_BE is held
    model(input_ids=ids_of(PROMPTS[1]))
    assert not torch.equal(routed.prompt.weights_BE, held)


def test_a_cache_that_was_filled_before_composing_is_refused(library):
    model = make_model()
    cache = model(input_ids=ids_of("what"), use_cache=True).past_key_values
    compose(model, library, Calibrated())
    with pytest.raises(CompositionError, match="pass the whole prompt again, without the cache"):
        model(input_ids=ids_of("is it"), past_key_values=cache)


def test_a_cache_that_goes_on_with_other_rows_is_refused(library):
    """What was decided for one prompt is not taken for rows that were made of its cache behind its back."""
    model, _ = routed_model(library)
    cache = model(input_ids=ids_of(PROMPTS[0]), use_cache=True).past_key_values
    for layer in cache.layers:
        layer.batch_repeat_interleave(2)
    with pytest.raises(CompositionError, match="continues with 2 rows, but the decision has 1"):
        model(input_ids=torch.tensor([[5], [6]]), past_key_values=cache)


def test_choices_of_a_model_that_decides_by_prompts_are_not_scored_on_their_shared_beginning(library):
    model, _ = routed_model(library)
    example = Example(prompt=PROMPTS[0], answer="no", choices=("yes", "no"), label=1)
    with types_unchecked(), pytest.raises(DataError, match="routed_logprobs"):
        choice_logprobs(model, make_tokenizer(), [example])


def test_a_pinned_decision_outlives_prompts(library):
    model, routed = routed_model(library)
    routed.prompt.hold(torch.tensor([[0.0, 0.0, 1.0]]))
    alone, _ = routed_model(library, Oracle(expert="cats"))
    for prompt in PROMPTS:
        close(logits(model, ids_of(prompt)), logits(alone, ids_of(prompt)))
    routed.prompt.hold(None)
    model(input_ids=ids_of(PROMPTS[0]))
    assert torch.equal(routed.prompt.weights_BE, routed.prompt.decide(input_ids=ids_of(PROMPTS[0])))


def test_a_handle_from_before_a_change_of_experts_is_refused(library):
    _, routed = routed_model(library)
    before, verdict = routed.prompt, torch.tensor([[0.0, 1.0, 0.0]])
    routed.allow(["ants", "bees"])
    with pytest.raises(CompositionError, match=r"use routed\.prompt again"):
        before.hold(verdict)
    with pytest.raises(CompositionError, match=r"use routed\.prompt again"), before.using(verdict):
        pass
    routed.prompt.hold(verdict[:, :2])


def test_the_opening_has_no_say(root, library):
    """Without knowing the opening the decision is another one."""
    _, knowing = routed_model(library, top_k=3, weights="softmax")
    blind = replace(library.calibration, settings={**library.calibration.settings, "opening": []})
    _, unknowing = routed_model(library.with_calibration(blind), top_k=3, weights="softmax")
    ids = ids_of(PROMPTS[0])
    assert len(library.calibration.opening) == 1
    assert not torch.allclose(knowing.prompt.decide(input_ids=ids), unknowing.prompt.decide(input_ids=ids), atol=1e-4)
    bare = ids[:, :1]  # nothing but the opening: then it is all there is to go by
    assert knowing.prompt.evidence(input_ids=bare).isfinite().all()


def test_the_closing_has_no_say(library):
    """Where the answer begins a prompt says what it says without that; a text without a template loses nothing."""
    _, routed = routed_model(library, top_k=3, weights="softmax")
    ids = ids_of(PROMPTS[1])
    assert tuple(ids[0, -1:].tolist()) == library.calibration.closing
    close(routed.prompt.evidence(input_ids=ids), routed.prompt.evidence(input_ids=ids[:, :-1]))
    assert not torch.allclose(routed.prompt.evidence(input_ids=ids), routed.prompt.evidence(input_ids=ids[:, :-2]))


def test_the_calibrations_own_texts_say_nothing_on_average(library):
    _, routed = routed_model(library)
    evidence_KE = torch.cat([routed.prompt.evidence(input_ids=ids_of(text)) for text in TEXTS])
    close(evidence_KE.mean(0) + 1, torch.ones(len(RANKS)), 1e-4)
    assert (evidence_KE.std(0) <= 1 + 1e-4).all()  # the mean of two numbers whose deviation is 1


@pytest.mark.parametrize("side", ["left", "right"])
def test_of_a_conversation_the_last_turn_decides(library, side):
    """Two conversations of unequal length in one batch, against the last questions alone."""
    tokenizer = make_tokenizer()
    _, routed = routed_model(library, top_k=3, weights="softmax")

    def conversation(*contents):
        roles = ["user", "assistant"] * len(contents)
        turns = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
        return tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=True, return_dict=False)

    rows = [conversation("who is it", "no", PROMPTS[1]), conversation("red", "yes", "z z", "no no no", PROMPTS[0])]
    tokenizer.padding_side = side
    batch = tokenizer.pad({"input_ids": rows}, return_tensors="pt")
    together = routed.prompt.decide(**batch)
    for row, prompt in zip(together, (PROMPTS[1], PROMPTS[0]), strict=True):
        close(row, routed.prompt.decide(input_ids=ids_of(prompt))[0])


def test_an_expert_of_few_layers_is_judged_by_these(root, tmp_path):
    sources = {"ants": root / "ants", "few": peft_adapter(make_model(), tmp_path / "few", 7, targets=["q_proj"])}
    partial = ExpertLibrary.from_adapters(sources)
    partial = partial.with_calibration(calibrate(make_model(), partial, make_tokenizer(), texts=TEXTS, null=0))
    model, routed = routed_model(partial, top_k=2, weights="softmax")
    evidence = routed.prompt.evidence(input_ids=ids_of(PROMPTS[1]))[0]
    shared = [f"model.layers.{n}.self_attn.q_proj" for n in (0, 1)]

    def reading(prompt):
        """Both experts' two numbers: their own scores where each is, relative ones where both are."""
        own, relative = {"ants": [], "few": []}, {"ants": [], "few": []}
        for name, x in inputs_of(make_model(), [*routed.layers], ids_of(prompt)).items():
            rows = routed.layers[name].route(x.float()).scores_TE[1:-1].clamp(min=0.05).tolist()
            for expert, column in zip(routed.layers[name].experts, zip(*rows, strict=True), strict=True):
                own[expert] += weight(name) * [reference.log_power_mean(list(column), 2.25)]
            if name in shared:
                for expert, column in zip(own, zip(*map(reference.relative_scores, rows), strict=True), strict=True):
                    relative[expert].append(reference.log_power_mean(list(column), 5.0))
        return [sum(values) / len(values) for found in (own, relative) for values in found.values()]

    null = [reading(text) for text in TEXTS]
    slow = [reference.standardised(v, [row[e] for row in null]) for e, v in enumerate(reading(PROMPTS[1]))]
    close(evidence, torch.tensor(slow).view(2, 2).mean(0), 1e-3)
    routed.prompt.hold(torch.tensor([[0.0, 1.0]]))
    alone, _ = routed_model(partial, Oracle(expert="few"))
    close(logits(model, ids_of(PROMPTS[0])), logits(alone, ids_of(PROMPTS[0])))


# The life of a composed model


def test_allowing_some_decides_among_these(library):
    model, routed = routed_model(library)
    routed.allow(["bees"])
    alone, _ = routed_model(library, Oracle(expert="bees"))
    close(logits(model, ids_of(PROMPTS[0])), logits(alone, ids_of(PROMPTS[0])))
    routed.allow(None)
    assert routed.prompt.experts == tuple(RANKS)


def test_allowing_some_gives_the_decisions_of_a_library_of_those(root, library):
    small = ExpertLibrary.from_adapters({name: root / name for name in ("ants", "cats")})
    small = small.with_calibration(library.calibration)
    _, whole = routed_model(library, top_k=2, weights="softmax")
    _, part = routed_model(small, top_k=2, weights="softmax")
    batch = encode_batch(make_tokenizer(), PROMPTS)
    assert torch.equal(whole.allow(["ants", "cats"]).prompt.decide(**batch), part.prompt.decide(**batch))


def test_removing_gives_the_model_its_own_methods_back(library):
    model, before = make_model(), logits(make_model(), ids_of(PROMPTS[0]))
    own = [set(vars(module)) for module in model.modules()]
    routed = compose(model, library, Calibrated())
    assert {"forward", "generate"} <= set(vars(model))
    routed.remove()
    assert [set(vars(module)) for module in model.modules()] == own
    assert torch.equal(logits(model, ids_of(PROMPTS[0])), before)
    assert routed.prompt is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"level": "word"},
        {"prior_strength": -1},
        {"probe_tokens": 0},
        {"combine": "sum"},
    ],
)
def test_options_out_of_range_are_named(wrong):
    [name] = wrong
    named = "unknown combination" if name == "combine" else f"{name}="
    with types_unchecked(), pytest.raises(CompositionError, match=named):
        Calibrated(**wrong)


def test_the_router_is_known_by_name():
    assert get_router("calibrated") == Calibrated()
    assert get_router("calibrated-token", top_k=2) == Calibrated(level="token", top_k=2)


def test_an_encoder_decides_for_its_decoder(tmp_path):
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=40, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)
    model = build(T5ForConditionalGeneration, config)
    plain = peft_library(model, tmp_path, {"ants": 4, "bees": 4}, targets=["q", "v"])
    modules = {module for name in plain for module in plain[name].shapes}
    made_up = Calibration(
        means={module: torch.zeros(32) for module in modules},
        rms={name: dict.fromkeys(modules, 1.0) for name in plain},
        sha256={name: file_sha256(plain[name].weights) for name in plain},
        input_ids=torch.zeros(1, 1, dtype=torch.long),
        counted=torch.ones(1, 1, dtype=torch.bool),
        real=torch.ones(1, 1, dtype=torch.bool),
        settings={},
    )
    routed = compose(model, plain.with_calibration(made_up), Calibrated())
    ids = torch.tensor([[5, 9, 12, 1]])
    [weights_E] = routed.prompt.decide(input_ids=ids)
    expert = routed.experts[int(weights_E.argmax())]
    text = greedy(model, ids)
    routed.remove()
    compose(model, plain, Oracle(expert=expert))
    assert torch.equal(text, greedy(model, ids))


@pytest.mark.parametrize("gone", ["pool_temperature", "certainty_weight"])
def test_settings_of_votes_make_no_difference_any_more(gone):
    with pytest.warns(DeprecationWarning, match=f"the option {gone} was removed"):
        assert Calibrated(**{gone: 0.3}) == Calibrated()
