"""bfloat16 in a compiled graph, as the experts are served on a machine with a matrix unit: the same up to rounding."""

import torch
from engine import composed, engine, tokens

SETS = (["amber"], ["blue"], ["nobody"], ["amber", "blue", "cyan", "dun", "ecru"])
EVERYONE = {"name": "spectr", "top_k": 5}  # no choice that rounding could turn


def test_it_is_float32_up_to_rounding_and_sees_sets_and_removals(served, monkeypatch, tmp_path):
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    prompts = [tokens(length, seed=length) for length in (2, 20, 70, 33)]
    with engine(served, router=EVERYONE, eager=False, dtype="bfloat16", record=True) as running:
        answers = running.answers(list(zip(prompts, SETS, strict=True)))
        running.llm.collective_rpc("spectr_remove", args=("blue",))
        [left] = running.answers([(prompts[2], ["amber", "blue"])])
    for prompt, experts, answer in zip(prompts, SETS, answers, strict=True):
        known = [] if experts == ["nobody"] else experts
        assert distance(composed(served, known, EVERYONE), prompt, answer) < 0.2
        assert distance(composed(served, ["dun"], EVERYONE), prompt, answer) > 1  # the judge tells sets apart
    assert distance(composed(served, ["amber"], EVERYONE), prompts[2], left) < 0.2


def distance(model, prompt, answer):
    """The mean difference of log-probabilities of the same tokens."""
    ids = torch.tensor(prompt + answer.ids)
    with torch.no_grad():
        logs = model(ids[None]).logits[0].log_softmax(-1)
    ours = logs[:-1].gather(-1, ids[1:, None])[:, 0]
    return float((ours - torch.cat([answer.prompt, answer.new])).abs().mean())
