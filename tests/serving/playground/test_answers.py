"""Answers stream in, and every token has the colour of its own experts."""

from __future__ import annotations

import threading

import pytest
from looking import bar, expect, words
from stand_in import BASE, EXPERTS, PLAIN, chunk, error

pytestmark = pytest.mark.browser

AGNEWS, COLA, MNLI, SST2 = (f"var(--e{number})" for number in range(4))


def test_text_is_there_while_the_server_still_writes(server, page, ask):
    gate = threading.Event()
    server.replies["spectr"] = [PLAIN[0], gate, *PLAIN[1:]]
    answer = ask(page, wait=False)
    expect(answer.locator(".body")).to_have_text("The")
    expect(answer.locator(".body")).to_have_attribute("aria-busy", "true")
    gate.set()
    expect(answer.locator(".body")).to_have_text("The film.")
    expect(answer.locator(".body")).to_have_attribute("aria-busy", "false")
    expect(answer.locator(".end")).to_contain_text("3 tokens")


def test_every_token_has_its_own_shares(page, ask):
    answer = ask(page)
    assert words(answer) == ["The", " film", "."]
    bars = [bar(token) for token in answer.locator(".token").all()]
    assert bars == [[(SST2, 90), (COLA, 10)], [(AGNEWS, 60)], [(AGNEWS, 50)]]


def test_who_takes_the_lead_is_written_too(page, ask):
    marks = ask(page).locator(".word").evaluate_all("nodes => nodes.map(node => node.dataset.mark ?? null)")
    assert marks == ["ss", "ag", None]


def test_the_legend_has_the_shares_of_the_whole_answer(page, ask):
    legend = ask(page).locator(".legend button")
    expect(legend).to_have_text(["agagnews 37 %", "sssst2 30 %", "cocola 3.3 %"])


def test_an_answer_of_the_base_model_says_that_no_expert_stands_out(server, page, ask):
    silent = [chunk("The", {}), chunk(" film", {}, finish="stop")]
    for one in silent:
        one["choices"][0]["routing"]["p"] = 0.4
    server.replies["spectr"] = silent
    expect(ask(page).locator(".legend")).to_have_text("No expert stands out (p = 0.40): the base model answered.")


def test_one_expert_alone_can_be_looked_at(page, ask):
    answer = ask(page)
    answer.locator(".legend button", has_text="cola").click()
    assert [bar(token) for token in answer.locator(".token").all()] == [[(COLA, 10)], [], []]
    expect(answer.locator(".legend button", has_text="cola")).to_be_focused()
    answer.locator(".legend button[aria-pressed=true]").click()
    assert bar(answer.locator(".token").first) == [(SST2, 90), (COLA, 10)]


def test_the_tooltip_has_names_and_shares(page, ask):
    ask(page).locator(".token").first.hover()
    expect(page.get_by_role("tooltip")).to_contain_text("The")
    expect(page.locator("#tip li")).to_have_text(["sssst290 %", "cocola10 %"])
    page.mouse.move(2, 2)
    expect(page.locator("#tip")).to_be_hidden()


def test_tokens_whose_bytes_are_held_back_share_the_text_that_comes(server, page, ask):
    held = [
        chunk("", {"cola": 1.0}),
        chunk(None, {"sst2": 0.5}),
        chunk("é!", {"cola": 0.4}),
        chunk(" ok", {"mnli": 1.0}),
    ]
    server.replies["spectr"] = held
    answer = ask(page)
    assert words(answer) == ["é!", " ok"]
    assert bar(answer.locator(".token").first) == [(COLA, 47), (SST2, 17)]
    answer.locator(".token").first.hover()
    expect(page.locator("#tip")).to_contain_text("mean of 3 tokens")


def test_several_tokens_in_a_chunk_are_their_mean(server, page, ask):
    server.replies["spectr"] = [chunk("two words", {"cola": 1.0}, {"sst2": 0.5})]
    answer = ask(page)
    assert bar(answer.locator(".token")) == [(COLA, 50), (SST2, 25)]
    expect(answer.locator(".end")).to_contain_text("2 tokens")


def test_text_without_routing_gets_no_colour(server, page, ask):
    server.replies["spectr"] = [chunk("known", {"cola": 1.0}), chunk(" unknown"), chunk(" again", {"cola": 1.0})]
    answer = ask(page)
    expect(answer.locator(".body")).to_have_text("known unknown again")
    assert words(answer) == ["known", " again"]


def test_a_token_without_text_at_the_end_can_be_looked_at(server, page, ask):
    server.replies["spectr"] = [chunk("Yes", {"cola": 1.0}), chunk("", {"mnli": 0.7}, finish="stop")]
    last = ask(page).locator(".token").last
    expect(last).to_have_accessible_name("end of the answer")
    assert bar(last) == [(MNLI, 70)]


def test_a_token_of_the_base_model_alone_reports_it(server, page, ask):
    server.replies["spectr"] = [chunk("Yes", {})]
    ask(page).locator(".token").hover()
    expect(page.locator("#tip")).to_contain_text("No expert: only the base model.")


def test_without_routing_it_is_a_chat(server, page, ask):
    server.replies["spectr"] = [chunk("Hello"), chunk(" there", finish="stop")]
    answer = ask(page)
    expect(answer.locator(".body")).to_have_text("Hello there")
    assert words(answer) == []
    ask(page, "And now?")
    said = [(message["role"], message["content"]) for message in server.asked[-1]["messages"]]
    assert said == [("user", "Who are you?"), ("assistant", "Hello there"), ("user", "And now?")]


def test_a_server_that_refuses_routing_is_asked_without(server, page, ask):
    server.refusals["return_routing"] = (400, error("return_routing is off here.", "not_served", "return_routing"))
    answer = ask(page)
    expect(answer.locator(".body")).to_have_text("The film.")
    assert [request.get("return_routing") for request in server.asked] == ["layers", None]


def test_events_may_be_cut_anywhere(server, page, ask):
    server.raw = (
        b": hello\r\n\r\nevent: x\r\ndata: "
        + b'{"choices":[{"delta":{"content":"caf\xc3\xa9 \xf0\x9f\x98\x80"}}]}\r\n\r\n'
    )
    expect(ask(page).locator(".body")).to_have_text("café 😀")


def test_listeners_hear_whole_sentences(server, page, ask):
    gate = threading.Event()
    server.replies["spectr"] = [chunk("One"), chunk(" day. Then"), gate, chunk(" more")]
    ask(page, wait=False)
    spoken = page.get_by_role("log")
    expect(spoken).to_have_text("spectr: One day. ", use_inner_text=False)
    gate.set()
    expect(spoken).to_have_text("spectr: One day. Then more")
    expect(spoken).to_have_attribute("aria-live", "polite")


def test_system_message_length_and_temperature_are_sent(server, page, ask):
    page.fill("#system", "Be brief.")
    page.fill("#tokens", "7")
    page.fill("#temperature", "0.5")
    ask(page)
    [request] = server.asked
    assert request["messages"][0] == {"role": "system", "content": "Be brief."}
    assert (request["max_tokens"], request["temperature"], request["stream"]) == (7, 0.5, True)
    page.fill("#tokens", "")
    ask(page)
    assert "max_tokens" not in server.asked[-1]


def test_a_new_chat_forgets_the_old_one(server, page, ask):
    ask(page)
    page.get_by_role("button", name="New chat").click()
    expect(page.locator(".turn")).to_have_count(0)
    ask(page, "Again")
    assert server.asked[-1]["messages"] == [{"role": "user", "content": "Again"}]


def test_shift_enter_is_a_new_line(server, page):
    page.locator("#question").press_sequentially("a")
    page.locator("#question").press("Shift+Enter")
    page.locator("#question").press_sequentially("b")
    expect(page.locator("#question")).to_have_value("a\nb")
    assert server.asked == []


def test_an_answer_cut_at_the_limit_reports_it(server, page, ask):
    server.replies["spectr"] = [chunk("Once", {"cola": 1.0}, finish="length")]
    expect(ask(page).locator(".end")).to_contain_text("stopped at the maximum number of tokens")


def test_the_base_model_is_not_asked_for_routing(server, page, ask):
    page.select_option("#model", BASE)
    ask(page)
    assert "return_routing" not in server.asked[-1]
    assert "experts" not in server.asked[-1]


def test_scores_by_layer_can_be_left_out(server, page, ask):
    page.get_by_label("Scores by layer").uncheck()
    ask(page)
    assert server.asked[-1]["return_routing"] is True
    assert len(EXPERTS) == page.locator("#boxes input").count()


def test_marks_tell_names_apart(server, page, ask):
    names = ["expert-30", "expert-3", "expert", "exa", "sst2", "sst-2", "日本", "…", "e", "e-2"]
    server.replies["spectr"] = [chunk(f" {name} and much more", {name: 1.0}, experts=names) for name in names]
    marks = ask(page).locator(".word").evaluate_all("nodes => nodes.map(node => node.dataset.mark)")
    assert marks == ["e30", "e3", "ex", "ea", "ss", "s2", "日本", "?.2", "e.2", "e2"]


def test_where_marks_would_overlap_a_dot_stands(server, page, ask):
    leaders = ["cola", "mnli", "mnli", "sst2", "cola", "cola"]
    texts = ["a", "bb", "longer", "c", "d", "\ne"]
    parts = [chunk(text, {name: 1.0}) for text, name in zip(texts, leaders, strict=True)]
    server.replies["spectr"] = parts
    marks = ask(page).locator(".word").evaluate_all("nodes => nodes.map(node => node.dataset.mark ?? null)")
    assert marks == ["co", "·", "mn", "ss", "·", "co"]
