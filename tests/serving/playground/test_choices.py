"""Which model and which experts answer, compared with what, until when, and what the page shows if something fails."""

from __future__ import annotations

import threading

import pytest
from looking import expect, words
from stand_in import BASE, EXPERTS, PLAIN, chunk, error

pytestmark = pytest.mark.browser


def test_all_experts_is_no_wish_at_all(server, page, ask):
    ask(page)
    assert server.asked[-1]["model"] == "spectr"
    assert "experts" not in server.asked[-1]


def test_ticks_are_the_requests_experts(server, page, ask):
    page.get_by_role("checkbox", name="cola").uncheck()
    page.get_by_role("checkbox", name="sst2").press("Space")
    expect(page.locator("#count")).to_have_text("2 of 4")
    ask(page)
    assert server.asked[-1]["experts"] == ["agnews", "mnli"]
    page.locator("#all").click()
    ask(page)
    assert "experts" not in server.asked[-1]


def test_nobody_ticked_is_said_before_anything_is_sent(server, page, ask):
    page.locator("#none").click()
    page.fill("#question", "Who?")
    page.locator("#send").click()
    expect(page.locator("#advice")).to_have_text("Tick at least one expert, or choose the base model.")
    expect(page.locator("#question")).to_have_value("Who?")
    assert server.asked == []


def test_an_expert_alone_is_a_model(server, page, ask):
    page.select_option("#model", "spectr/sst2")
    expect(page.get_by_role("checkbox", name="cola")).to_be_disabled()
    ask(page)
    assert server.asked[-1]["model"] == "spectr/sst2"
    assert "experts" not in server.asked[-1]


def test_models_are_distinguished(page):
    groups = page.locator("#model optgroup").evaluate_all(
        "groups => groups.map(group => [group.label, [...group.children].map(option => option.textContent)])"
    )
    assert groups == [["Routed among experts", ["spectr"]], ["Base model", [BASE]], ["A single expert", list(EXPERTS)]]


def test_a_server_of_one_plain_model_is_enough(server, visit, ask):
    server.models = ["org/other"]
    page = visit()
    expect(page.locator("#experts")).to_be_hidden()
    ask(page)
    assert server.asked[-1]["model"] == "org/other"


def test_many_experts_can_be_searched(server, visit):
    server.models = ["spectr", *(f"spectr/expert-{number}" for number in range(40)), BASE]
    page = visit()
    page.get_by_label("Find experts").fill("-3")
    expect(page.locator("#boxes label:visible")).to_have_count(11)
    page.locator("#none").click()
    expect(page.locator("#count")).to_have_text("29 of 40")


def test_two_models_answer_side_by_side_and_at_once(server, page, ask):
    gate = threading.Event()
    server.replies["spectr"] = [PLAIN[0], gate, *PLAIN[1:]]
    server.replies[BASE] = [chunk("I"), gate, chunk(" am.")]
    page.select_option("#beside", BASE)
    ask(page, wait=False)
    bodies = page.locator(".answer .body")
    expect(bodies).to_have_text(["The", "I"])
    left, right = (body.bounding_box() for body in bodies.all())
    assert left["x"] + left["width"] < right["x"]
    assert left["y"] == right["y"]
    gate.set()
    expect(bodies).to_have_text(["The film.", "I am."])


def test_each_side_remembers_what_it_said(server, page, ask):
    server.replies[BASE] = [chunk("I am.")]
    page.select_option("#beside", BASE)
    ask(page)
    ask(page, "And?")
    by_model = {
        request["model"]: [message["content"] for message in request["messages"]] for request in server.asked[-2:]
    }
    assert by_model == {"spectr": ["Who are you?", "The film.", "And?"], BASE: ["Who are you?", "I am.", "And?"]}


def test_one_side_may_fail_alone(server, page, ask):
    server.refusals[BASE] = (404, error("No model of this name.", "model_not_found", "model"))
    page.select_option("#beside", BASE)
    ask(page)
    expect(page.locator(".answer").first.locator(".body")).to_have_text("The film.")
    expect(page.locator(".answer").last.get_by_role("alert")).to_contain_text("No model of this name.")


def test_stop_hangs_up_and_keeps_the_text(server, page, ask):
    server.replies["spectr"] = [PLAIN[0], threading.Event(), *PLAIN[1:]]
    answer = ask(page, wait=False)
    expect(answer.locator(".body")).to_have_text("The")
    page.get_by_role("button", name="Stop").click()
    expect(answer.locator(".end")).to_contain_text("stopped")
    assert server.hung_up.wait(5)
    assert words(answer) == ["The"]
    expect(page.locator("#question")).to_be_focused()
    expect(page.get_by_role("button", name="Send")).to_be_visible()


@pytest.mark.parametrize(
    ("refusal", "says"),
    [
        (
            (404, error("No such expert.", "expert_not_found", "experts")),
            "No such expert.404 · expert_not_found · in “experts”",
        ),
        ((502, "<h1>Bad gateway</h1>"), "The server answered 502 Bad Gateway: <h1>Bad gateway</h1>502"),
        ((500, {"error": "boom"}), "boom500"),
        ((503, ""), "The server answered 503 Service Unavailable503"),
    ],
)
def test_what_the_server_says_is_shown_in_place(server, page, ask, refusal, says):
    server.refusals["spectr"] = refusal
    expect(ask(page).get_by_role("alert")).to_have_text(says)
    expect(page.locator("#question")).to_have_value("Who are you?")


@pytest.mark.parametrize(
    ("last", "says"),
    [
        (error("The engine died.", "engine_error", kind="server_error"), "The engine died."),
        ("not json", "The server sent something that is not JSON: not json"),
    ],
)
def test_trouble_in_the_middle_keeps_what_came(server, page, ask, last, says):
    server.replies["spectr"] = [PLAIN[0], last]
    answer = ask(page)
    expect(answer.get_by_role("alert")).to_contain_text(says)
    assert words(answer) == ["The"]


def test_a_stream_without_its_end_is_trouble(server, page, ask):
    server.cut = True
    expect(ask(page).get_by_role("alert")).to_contain_text("The connection ended before the answer was complete.")


def test_a_server_that_is_gone_is_named(server, visit, ask):
    page = visit()
    page.context.set_offline(True)
    host = server.url.split("/")[2]
    expect(ask(page).get_by_role("alert")).to_have_text(f"No answer from {host}. Is the server still running?")
    assert visit.faults.pop().endswith("net::ERR_INTERNET_DISCONNECTED")


def test_a_missing_key_is_asked_for_where_it_goes(server, visit, ask):
    server.keys = {"sk-right"}
    page = visit()
    expect(page.locator("#trouble")).to_have_text("No such API key.")
    expect(page.locator("#key")).to_be_focused()
    page.locator("#key").fill("sk-right")
    page.locator("#key").press("Enter")
    expect(page.locator("#trouble")).to_be_hidden()
    expect(page.locator("#boxes input")).to_have_count(4)
    expect(ask(page).locator(".body")).to_have_text("The film.")


def test_the_key_lives_in_the_tab_alone(server, visit):
    server.keys = {"sk-right"}
    page = visit()
    page.locator("#key").fill("sk-right")
    page.locator("#key").press("Tab")
    expect(page.locator("#boxes input")).to_have_count(4)
    assert page.evaluate("[Object.values(sessionStorage), localStorage.length, document.cookie]") == [
        ["sk-right"],
        0,
        "",
    ]
    page.reload()
    expect(page.locator("#boxes input")).to_have_count(4)
    other = page.context.new_page()
    other.goto(server.url)
    expect(other.locator("#trouble")).to_have_text("No such API key.")


def test_one_of_several_routers_can_be_chosen(server, visit, ask):
    server.routers = ["calibrated", "spectr", "arrow"]
    page = visit()
    ask(page)
    assert "router" not in server.asked[-1]
    page.get_by_label("Router", exact=True).select_option("arrow")
    ask(page)
    assert server.asked[-1]["router"] == "arrow"


def test_without_a_choice_of_routers_none_is_offered(page):
    expect(page.get_by_label("Router", exact=True)).to_be_hidden()


def test_a_key_that_cannot_be_sent_is_refused_by_the_page(page):
    page.locator("#key").fill("sk-“quoted”")
    page.locator("#key").press("Tab")
    expect(page.locator("#trouble")).to_have_text(
        "The API key contains characters that are not allowed. Copy it again."
    )


def test_a_new_chat_ends_the_stream(server, page, ask):
    server.replies["spectr"] = [threading.Event()]
    ask(page, wait=False)
    page.get_by_role("button", name="New chat").click()
    assert server.hung_up.wait(5)
    page.locator("#send").wait_for()
    expect(page.locator("#question")).to_have_value("")
    expect(page.locator(".turn")).to_have_count(0)


@pytest.mark.parametrize("score", [9.3, "not finite"])
def test_an_outlier_is_flagged_in_the_list_with_the_reason(server, visit, score):
    server.outlier_scores["spectr/cola"] = score
    page = visit()
    [flag] = page.locator("#boxes .warning").all()
    why = f"Far larger updates than the other experts' (robust z-score {score}). It is served anyway."
    expect(flag).to_have_attribute("title", why)
    expect(flag).to_be_visible()
    box = page.get_by_role("checkbox", name="cola")
    expect(box).to_have_accessible_name(f"cola {why}")
    expect(box).to_be_checked()
