"""The pictures' data against the trace they come from."""

import json
import re
from importlib import resources

import pytest
import torch

import spectr
from spectr.layers import trace
from spectr.models import encode_batch
from spectr.plots import colours, palette, tints, token_routing, write_heat_map, write_page, write_token_map
from text_model import make_model, make_tokenizer, save_experts


@pytest.fixture(scope="module")
def routings(tmp_path_factory):
    model, tokenizer = make_model(), make_tokenizer()
    library = spectr.ExpertLibrary.open(save_experts(tmp_path_factory.mktemp("experts"), ("a<b", "b", "c")))
    spectr.compose(model, library, spectr.Spectr(top_k=2))
    with trace(model) as record:
        model(**encode_batch(tokenizer, ["what is it", "the sky is blue <unk> yes"]))
    return record, [token_routing(record, tokenizer, title=f"</script> {i}", batch=i, skip=1) for i in range(2)]


def test_padding_and_skipped_tokens_are_left_out(routings):
    record, pictures = routings
    for number, picture in enumerate(pictures):
        assert len(picture.tokens) == int(record.mask[number].sum()) - 1
        assert picture.weights.shape == (3, len(picture.tokens), 3)


def test_weights_are_the_means_of_the_layers_weights(routings):
    record, [picture, _] = routings
    real = record.mask[0].nonzero().squeeze(1)[1:]
    first = [layer.weights[0, real] for name, layer in record.items() if ".0." in name]
    torch.testing.assert_close(picture.weights[1], torch.stack(first).mean(0))
    every = [layer.weights[0, real] for layer in record.values()]
    torch.testing.assert_close(picture.weights[0], torch.stack(every).mean(0))
    assert sum(picture.shares.values()) == pytest.approx(1, abs=1e-5)


def test_the_page_is_self_contained_and_carries_the_weights(routings, tmp_path):
    _, pictures = routings
    page = write_page(pictures, tmp_path / "page.html", title="a < b", subtitle="x & y").read_text()
    assert "a &lt; b" in page
    assert "x &amp; y" in page
    assert not re.search(r"(src|href)\s*=|@import|url\(", page)
    data = json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.S)[1])
    assert [expert["name"] for expert in data["experts"]] == ["a<b", "b", "c"]
    assert data["texts"][1]["title"] == "</script> 1"
    assert data["texts"][1]["tokens"] == list(pictures[1].tokens)
    expected = (pictures[1].weights * 1000).round().int().tolist()
    assert data["texts"][1]["weights"] == expected


def test_png_files_are_written_where_they_are_asked_for(routings, tmp_path):
    _, pictures = routings
    for path in (
        write_heat_map(pictures, tmp_path / "new" / "heat.png", title="t"),
        write_token_map(pictures[0], tmp_path / "tokens.png"),
    ):
        assert path.read_bytes().startswith(b"\x89PNG")


def test_every_expert_has_its_own_colour():
    names = [str(number) for number in range(60)]
    found = colours(names)
    assert len(set(found.values())) == 60
    assert len(set(tints(names).values())) == 60
    assert all(re.fullmatch("#[0-9a-f]{6}", colour) for colour in found.values())


@pytest.mark.parametrize(("ours", "block"), [(palette.LIGHT, 0), (palette.DARK, 1)])
def test_an_expert_has_the_colour_that_it_has_on_the_playgrounds_page(ours, block):
    style = resources.files("spectr.serving") / "playground" / "style.css"
    css = style.read_text(encoding="utf-8").split("prefers-color-scheme: dark")[block]
    assert tuple(re.findall(r"--e\d: (#\w{6})", css)) == ours
    assert palette.colours(list("abcdefghij")) == dict(zip("abcdefghij", palette.LIGHT, strict=True))


@pytest.mark.parametrize("ink", ["#000000", "#1d2430"])
def test_text_can_be_read_on_every_tint(ink):
    for tint in tints([str(number) for number in range(60)]).values():
        assert contrast(ink, tint) >= 4.5


def contrast(*pair):
    """WCAG 2's contrast ratio of two hex colours."""

    def luminance(colour):
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    dark, light = sorted(map(luminance, pair))
    return (light + 0.05) / (dark + 0.05)
