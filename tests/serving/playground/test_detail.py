"""A token close up: by pointer, by keyboard and by ear."""

from __future__ import annotations

import pytest
from looking import expect
from stand_in import LAYERS, chunk

pytestmark = pytest.mark.browser


def focused(page):
    return page.evaluate("document.activeElement.textContent")


def test_a_click_shows_shares_and_all_layers(page, ask):
    ask(page).locator(".token").first.click()
    detail = page.get_by_role("complementary", name="Scores of one token")
    expect(detail.get_by_role("heading", level=2)).to_have_text("Token The")
    expect(detail.locator(".shares li")).to_have_text(["sssst290 %", "cocola10 %"])
    expect(detail.locator("tbody").get_by_role("gridcell")).to_have_count(len(LAYERS))
    expect(page.locator(".token").first).to_have_attribute("aria-current", "true")
    expect(page.locator(".token").first).to_be_focused()


def test_rows_are_blocks_and_columns_are_kinds(page, ask):
    ask(page).locator(".token").first.click()
    table = page.locator(".layers")
    expect(table.get_by_role("rowheader")).to_have_text(["0", "1", "2", "3"])
    expect(table.get_by_role("columnheader")).to_have_text(["self_attn", "mlp", *"qkvo", "gate", "up", "down"])
    [cell] = table.locator("[data-number='9']").all()  # the tenth layer: block 1, v_proj
    assert cell.evaluate("cell => [cell.parentElement.rowIndex - 2, cell.cellIndex - 1]") == [1, 2]
    expect(cell).to_have_accessible_name("sst2 0.9, score 1.9; cola 0.1, score 1.9")


def test_pointing_at_a_cell_reads_it(page, ask):
    ask(page).locator(".token").first.click()
    page.locator("[data-number='9']").hover()
    readout = page.locator(".readout")
    expect(readout.locator(".layer")).to_have_text("model.layers.1.self_attn.v_proj")
    expect(readout.locator("tr")).to_have_text(["expertweightscore", "sssst20.91.9", "cocola0.11.9"])
    page.get_by_role("button", name="Next token").click()  # the same layer of another token
    expect(readout.locator(".layer")).to_have_text("model.layers.1.self_attn.v_proj")
    expect(readout.locator("tr")).to_have_text(["expertweightscore", "agagnews0.61.9"])


def test_a_cell_has_the_colour_and_the_mark_of_its_top_expert(page, ask):
    ask(page).locator(".token").first.click()
    cell = page.locator("[data-number='0']")
    expect(cell.locator("[aria-hidden]")).to_have_text("ss")
    assert cell.evaluate("cell => cell.style.getPropertyValue('--hue')") == "var(--e3)"


def test_the_keyboard_reaches_everything(page, ask):
    ask(page)
    tokens = page.locator(".token")
    page.keyboard.press("Shift+Tab")  # from the question back: the legend, then the answer
    for _ in page.locator(".legend button").all():
        page.keyboard.press("Shift+Tab")
    expect(tokens.nth(0)).to_be_focused()
    expect(tokens.nth(0)).to_have_accessible_description("The sst2 90 % cola 10 %")
    page.keyboard.press("ArrowRight")
    expect(tokens.nth(1)).to_be_focused()
    page.keyboard.press("End")
    expect(tokens.nth(2)).to_be_focused()
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Enter")
    assert focused(page) == "Token ␣film"
    for _ in range(4):  # before, next, close, the picture
        page.keyboard.press("Tab")
    expect(page.locator("[data-number='0']")).to_be_focused()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    expect(page.locator("[data-number='8']")).to_be_focused()
    page.keyboard.press("Home")
    expect(page.locator("[data-number='7']")).to_be_focused()
    page.keyboard.press("ArrowLeft")  # nothing is there
    expect(page.locator("[data-number='7']")).to_be_focused()
    page.keyboard.press("Escape")
    expect(page.locator("#detail")).to_be_hidden()
    expect(tokens.nth(1)).to_be_focused()


def test_the_panel_follows_who_walks_through_the_answer(page, ask):
    ask(page).locator(".token").first.click()
    page.locator(".token").first.focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator("#detail h2")).to_have_text("Token ␣film")
    expect(page.locator(".token").nth(1)).to_be_focused()


def test_up_and_down_go_by_lines(server, page, ask):
    server.replies["spectr"] = [
        chunk(text, {"cola": 1.0}) for text in ("aaa", " bbb", " ccc", "\n", "aaa", " bbb", " ccc")
    ]
    ask(page).locator(".token").nth(1).focus()
    page.keyboard.press("ArrowDown")
    expect(page.locator(".token").nth(5)).to_be_focused()
    page.keyboard.press("ArrowUp")
    expect(page.locator(".token").nth(1)).to_be_focused()
    page.locator(".token").nth(3).focus()
    expect(page.locator(".token").nth(3)).to_have_accessible_name("line break")


def test_without_layers_the_panel_has_the_shares(server, page, ask):
    server.replies["spectr"] = [chunk("Hi", {"cola": 0.5}, layers=False)]
    ask(page).locator(".token").click()
    expect(page.locator("#detail .shares")).to_have_text("cocola50 %")
    expect(page.locator("#detail")).to_contain_text("The server sent no scores by layer with this token.")


def test_several_tokens_of_one_text_are_averaged_by_layer(server, page, ask):
    server.replies["spectr"] = [chunk("ab", {"cola": 1.0}, {"sst2": 0.5})]
    ask(page).locator(".token").click()
    expect(page.locator("[data-number='0']")).to_have_accessible_name("cola 0.5, score 1; sst2 0.25, score 1")


def test_models_of_other_shapes_find_their_rows(server, page, ask):
    names = [
        "lm_head",
        "encoder.block.0.layer.0.SelfAttention.q",
        "decoder.block.0.layer.1.EncDecAttention.q",
        "h.7.attn.c_attn",
    ]
    server.replies["spectr"] = [chunk("a", {"cola": 1.0}, names=names)]
    ask(page).locator(".token").click()
    expect(page.locator(".layers").get_by_role("rowheader")).to_have_text(["–", "encoder 0", "decoder 0", "h 7"])
    expect(page.locator(".layers thead tr").last.locator("th")).to_have_text(["lm_head", "q", "q", "c_attn"])


def test_what_assistive_technology_reads(page, ask):
    answer = ask(page)
    answer.locator(".token").first.click()
    expect(answer).to_match_aria_snapshot("""
      - article:
        - heading "spectr" [level=3]
        - group "Answer of spectr":
          - button "The"
          - button "film"
          - button "."
        - button "agnews 37 %"
        - button "sst2 30 %"
        - button "cola 3.3 %"
        - paragraph: /3 tokens · \\d\\.\\d s/
    """)
    detail = page.get_by_role("complementary", name="Scores of one token")
    expect(detail).to_match_aria_snapshot("""
      - heading "Token The" [level=2]
      - button "Token before" [disabled]
      - button "Next token"
      - button "Close"
      - list:
        - listitem: sst2 90 %
        - listitem: cola 10 %
      - heading "Layers" [level=3]
      - paragraph: model.layers.0.self_attn.q_proj
      - table
      - grid "Experts by layer, most weight first":
        - rowgroup
        - rowgroup:
          - row:
            - rowheader "0"
            - gridcell "sst2 0.9, score 1; cola 0.1, score 1" [selected]
            - gridcell "sst2 0.9, score 1.1; cola 0.1, score 1.1"
    """)


def test_the_settings_have_names(page):
    expect(page.get_by_role("form", name="Settings")).to_match_aria_snapshot("""
      - text: Model
      - combobox "Model"
      - text: Compare with
      - combobox "Compare with"
      - group "Experts 4 of 4":
        - button "All"
        - button "None"
        - checkbox "agnews" [checked]
        - checkbox "cola" [checked]
        - checkbox "mnli" [checked]
        - checkbox "sst2" [checked]
      - textbox "System message"
      - spinbutton "Max tokens": "256"
      - spinbutton "Temperature": "0"
      - checkbox "Scores by layer much larger answers" [checked]
      - textbox "API key"
    """)


def test_of_very_many_experts_the_first_are_listed(server, page, ask):
    names = [f"e{number}" for number in range(64)]
    server.replies["spectr"] = [chunk("Hi", dict.fromkeys(names, 1 / 64), experts=names)]
    ask(page).locator(".token").hover()
    expect(page.locator("#tip li").last).to_have_text("and 58 more")
    page.locator(".token").click()
    expect(page.locator("#detail .shares li").last).to_have_text("and 52 more")
    expect(page.locator(".readout tr")).to_have_count(65)
    expect(page.locator(".legend button")).to_have_count(12)
