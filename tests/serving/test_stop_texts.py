"""An answer ends before the client's ``stop`` texts, whole or streamed, wherever their tokens begin and end."""

import random

import pytest

from asking import PROMPTS, ask, open_to
from serving import served
from spectr.serving.engines.stop_texts import StopFilter, before

STOPS = [["ab"], ["ba", "c"], ["\u00e9\u4e2d", "aa"], ["abab", "bb\u00e9", "\u4e2d"], ["zzz"]]


@pytest.mark.parametrize("stops", STOPS)
def test_what_is_passed_on_is_the_text_before_the_first_stop(stops):
    draw = random.Random(0)
    for _ in range(200):
        pieces = ["".join(draw.choices("abc\u00e9\u4e2d", k=draw.randint(0, 3))) for _ in range(8)]
        passed, seen = [], ""
        take = StopFilter(stops, passed.append)
        for piece in [*pieces, None]:
            take(piece)
        for piece in pieces:  # the generation ends with the piece that completes a stop
            seen += piece
            if before(seen, stops) != seen:
                break
        assert passed.pop() is None
        assert "".join(passed) == before(seen, stops)


def test_a_piece_waits_only_while_it_may_begin_a_stop():
    passed = []
    take = StopFilter(["no other"], passed.append)
    for piece in ("yes", " no", " oth", "ello"):
        take(piece)
    assert passed == ["yes", " ", "no othello"]


@pytest.mark.parametrize("kind", ["chat", "text"])
def test_a_stop_of_several_tokens_ends_whole_answers_and_streams_alike(library, kind):
    with served(library) as (address, _), open_to(address) as client:

        def create(**given):
            if kind == "chat":
                return ask(client, PROMPTS[0], max_tokens=10, return_routing=True, **given)
            extra = {"extra_body": {"return_routing": True}}
            return client.completions.create(model="spectr", prompt="the sky is", max_tokens=10, **extra, **given)

        def text(choice):
            return choice.text if kind == "text" else choice.message.content

        free = text(create().choices[0])
        words = free.split()
        stop = " ".join(words[2:4])
        whole = create(stop=["never said", stop])
        assert text(whole.choices[0]) == free.partition(stop)[0]
        assert (whole.choices[0].finish_reason, whole.usage.completion_tokens) == ("stop", 4)
        *chunks, last = create(stop=stop, stream=True, stream_options={"include_usage": True})
        pieces = [c.text if kind == "text" else c.delta.content for chunk in chunks for c in chunk.choices]
        assert "".join(piece or "" for piece in pieces) == text(whole.choices[0])
        assert last.usage == whole.usage
        tokens = [token for chunk in chunks for token in chunk.choices[0].routing["tokens"]]
        assert tokens == whole.choices[0].routing["tokens"]
        assert len(tokens) == 4


def test_a_bias_of_a_whole_number_changes_the_answer(library):
    with served(library) as (address, engine), open_to(address) as client:
        [token] = engine.tokenizer("grass", add_special_tokens=False)["input_ids"]
        answer = ask(client, PROMPTS[0], max_tokens=3, logit_bias={str(token): 100}).choices[0].message.content
        assert answer.split() == ["grass"] * 3
        free = ask(client, PROMPTS[0], max_tokens=3).choices[0].message.content
        assert ask(client, PROMPTS[0], max_tokens=3, logit_bias={}).choices[0].message.content == free
