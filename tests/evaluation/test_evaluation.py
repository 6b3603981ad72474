"""Choice scoring against one plain forward pass for each prompt and choice."""

import pytest
import torch

from spectr.evaluation import accuracy, choice_logprobs, predict
from spectr.models import encode_answer, encode_prompt, shared_prefix
from spectr.tasks import Example
from text_model import make_model, make_tokenizer

EXAMPLES = [
    Example(prompt="what is the colour of the sky", answer="blue", choices=("blue", "green grass is"), label=0),
    Example(prompt="what is it", answer="no", choices=("yes", "no", "a good film"), label=1),
    Example(prompt="what is the", answer="red", choices=("red red", "red"), label=1),
]


def slow_logprobs(model, tokenizer, example):
    """One full forward pass a choice, no cache, no padding, no shared prefix."""
    scores = []
    for choice in example.choices:
        prompt, answer = encode_prompt(tokenizer, example.prompt), encode_answer(tokenizer, choice)
        logits = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        scores.append(sum(logits[len(prompt) - 1 + i, token].item() for i, token in enumerate(answer)))
    return torch.tensor(scores)


@pytest.mark.parametrize("batch_size", [1, 2, 16])
@pytest.mark.parametrize("examples", [EXAMPLES, EXAMPLES[:1]], ids=["several", "one"])
def test_logprobs_equal_one_forward_pass_per_choice(batch_size, examples):
    model, tokenizer = make_model(), make_tokenizer()
    fast = choice_logprobs(model, tokenizer, examples, batch_size=batch_size)
    for example, scores in zip(examples, fast, strict=True):
        torch.testing.assert_close(scores, slow_logprobs(model, tokenizer, example), atol=1e-5, rtol=1e-5)


def test_a_prompt_without_tokens_is_refused_by_its_number():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    some = [Example(prompt=prompt, answer="no", choices=("no", "yes"), label=0) for prompt in ("it", "")]
    with pytest.raises(ValueError, match="example 2: the prompt '' has no tokens"):
        choice_logprobs(make_model(), tokenizer, some)


def test_length_normalised_is_the_mean_over_the_tokens_of_the_choice():
    model, tokenizer = make_model(), make_tokenizer()
    [_, plain, _] = choice_logprobs(model, tokenizer, EXAMPLES)
    [_, normal, _] = choice_logprobs(model, tokenizer, EXAMPLES, length_normalised=True)
    torch.testing.assert_close(normal, plain / torch.tensor([2.0, 2.0, 4.0]))


def test_progress_counts_every_example():
    seen = []
    choice_logprobs(make_model(), make_tokenizer(), EXAMPLES, batch_size=2, progress=seen.append)
    assert seen == [2, 1]


def test_accuracy_is_the_share_of_right_predictions():
    assert predict([torch.tensor([0.1, 0.9]), torch.tensor([0.9, 0.1])]) == [1, 0]
    assert accuracy([0, 0, 1], EXAMPLES) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("sequences", "prefix"),
    [([[1, 2, 3], [1, 2, 4]], [1, 2]), ([[1, 2], [1, 2, 3]], [1]), ([[1, 2], [1, 2]], [1]), ([[5], [5]], []), ([], [])],
)
def test_shared_prefix_leaves_every_sequence_a_token(sequences, prefix):
    assert shared_prefix(sequences) == prefix
