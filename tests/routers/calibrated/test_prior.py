"""A prompt's evidence as the prior of the decisions for each token and module."""

from __future__ import annotations

import torch
from calibrating import DOWN, PROMPTS, Q, ids_of, routed_model

from models import close, greedy, logits
from spectr import Calibrated, get_router, trace
from spectr.layers.batch_routing import routed_by
from spectr.models import encode_batch
from text_model import make_tokenizer


def test_without_strength_it_is_the_token_level(library):
    prior, _ = routed_model(library, level="prior", prior_strength=0.0, top_k=2, weights="softmax")
    token, _ = routed_model(library, level="token", top_k=2, weights="softmax")
    close(logits(prior, ids_of(PROMPTS[1])), logits(token, ids_of(PROMPTS[1])))


def test_with_much_strength_the_prompt_decides_alone(library):
    prior, routed = routed_model(library, level="prior", prior_strength=1e4)
    _, evident = routed_model(library, level="prior", prior_strength=1.0)
    prompt, _ = routed_model(library, level="prompt")
    ids = ids_of(PROMPTS[1])
    prior_E = evident.prompt.decide(input_ids=ids)[0]
    first, second = prior_E.topk(2).values
    assert first > second
    assert torch.isfinite(routed.prompt.decide(input_ids=ids)).all()
    close(logits(prior, ids), logits(prompt, ids))


def test_every_score_is_the_calibrated_one_times_the_prior(library):
    model, routed = routed_model(library, level="prior", prior_strength=3.0, top_k=1)
    plain, _ = routed_model(library, level="token", top_k=1)
    ids = ids_of(PROMPTS[1])
    _, evident = routed_model(library, level="prompt", top_k=3)
    evidence_E = evident.prompt.evidence(input_ids=ids)[0]
    given = torch.randn(1, 5, plain.get_submodule(Q).in_features, generator=torch.Generator().manual_seed(0))
    with routed_by(routed.prompt.routing(routed.prompt.decide(input_ids=ids))):
        found = model.get_submodule(Q).explain(given)
    close(
        found.scores_TE,
        plain.get_submodule(Q).route(given).scores_TE * (3 * (evidence_E - evidence_E.max())).exp(),
        1e-4,
    )
    assert set(routed.experts) == set(evident.experts)


def test_it_holds_while_the_answer_is_written_and_ends_with_the_prompt(library):
    model, routed = routed_model(library, level="prior", prior_strength=4.0)
    cache = model(input_ids=ids_of(PROMPTS[0]), use_cache=True).past_key_values
    held = routed.prompt.weights_BE
    model(input_ids=ids_of("z"), past_key_values=cache, use_cache=True)
    assert routed.prompt.weights_BE is held
    model(input_ids=ids_of(PROMPTS[1]))
    assert not torch.equal(routed.prompt.weights_BE, held)


def test_a_batch_has_a_prior_for_each_row(library):
    model, _ = routed_model(library, level="prior", prior_strength=4.0, top_k=2, weights="softmax")
    together = model(**encode_batch(make_tokenizer(), PROMPTS)).logits
    for row, prompt in zip(together, PROMPTS, strict=True):
        ids = ids_of(prompt)
        close(row[-ids.shape[1] :], logits(model, ids)[0], 1e-4)


def test_generation_runs_and_the_trace_shows_the_scores_in_force(library):
    model, _ = routed_model(library, level="prior", prior_strength=4.0)
    assert greedy(model, ids_of(PROMPTS[0])).shape[1] > len(ids_of(PROMPTS[0])[0])
    with trace(model) as record:
        model(input_ids=ids_of(PROMPTS[0]))
    scores_TE = record[DOWN].scores[0]
    assert torch.equal(scores_TE.argmax(-1), record[DOWN].weights[0].argmax(-1))


def test_it_is_known_by_name():
    assert get_router("calibrated-prior", top_k=2) == Calibrated(level="prior", top_k=2)
