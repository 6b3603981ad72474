"""PEFT's patterns, the summary and the picture."""

import re

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from spectr.adapters.write import rank_settings, targets
from spectr.extraction import Kept, Report, places, summary
from spectr.plots import write_energy_map
from spectr.plots.energy import energy_figure


def test_each_rank_pattern_is_one_module():
    from peft.utils.other import get_pattern_key

    ranks = {"lm_head": 3, "v.lm_head": 4, "layers.1.q": 5, "layers.11.q": 2, "x.layers.1.q": 2, "layersX1.q": 2}
    settings = rank_settings(ranks)
    assert (settings["r"], settings["lora_alpha"]) == (2, 2)
    for module, rank in ranks.items():
        key = get_pattern_key(settings["rank_pattern"].keys(), module)
        assert settings["rank_pattern"].get(key, settings["r"]) == rank
        assert settings["alpha_pattern"].get(key, settings["lora_alpha"]) == rank


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        (["a.0.q", "a.1.q"], ["q"]),
        (["a.0.q"], ["a.0.q"]),
        (["a.0.q", "a.1.q", "b.k"], ["k", "q"]),
        (["head"], r"head"),
    ],
)
def test_targets_are_as_short_as_they_can_be(chosen, expected):
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    modules = ["a.0.q", "a.1.q", "a.0.v", "b.k", "head", "inner.head"]
    found = targets(chosen, modules)
    assert found == expected
    config = LoraConfig(target_modules=found)
    assert [module for module in modules if check_target_module_exists(config, module)] == chosen


def report(modules, name="mine"):
    kept = tuple(
        Kept(module=module, rank=rank, share=share, change=1.0, relative=None, method="exact")
        for module, (rank, share) in modules.items()
    )
    return Report(name=name, base_model=None, modules=kept, left=(), remarks=(), origin={})


GPT2 = {
    f"h.{layer}.{kind}": (4 * (layer + 1), 0.2 + 0.3 * layer)
    for layer in range(3)
    for kind in ("attn.c_attn", "attn.c_proj", "mlp.c_proj")
    if (layer, kind) != (1, "attn.c_attn")
}


def test_kinds_are_distinguished_by_their_parents_where_they_have_to_be():
    found = places([*GPT2, "lm_head", "h.0.moe.experts.3.w1"])
    assert found["h.2.attn.c_attn"] == ("c_attn", 2)
    assert found["h.2.attn.c_proj"] == ("attn.c_proj", 2)
    assert found["h.0.mlp.c_proj"] == ("mlp.c_proj", 0)
    assert found["lm_head"] == ("lm_head", None)
    assert found["h.0.moe.experts.3.w1"] == ("w1", 0)


def test_the_summary_has_least_median_and_most_by_kind():
    rows = {row.kind: row for row in summary(report(GPT2))}
    assert list(rows) == ["c_attn", "attn.c_proj", "mlp.c_proj", "all"]
    assert rows["attn.c_proj"].rank == (4, 8, 12)
    assert rows["attn.c_proj"].share == pytest.approx((0.2, 0.5, 0.8))
    assert rows["c_attn"].rank == (4, 8, 12)
    assert rows["all"].modules == 8
    assert rows["all"].relative is None
    assert [row.kind for row in summary(report({"h.0.q": (1, 0.5)}))] == ["q"]


def texts(axes):
    return [text.get_text() for text in axes.texts]


def test_the_picture_shows_every_module_once():
    figure = energy_figure(report({**GPT2, "lm_head": (128, 0.999)}))
    share, rank = figure.axes[:2]
    assert [label.get_text() for label in share.get_yticklabels()] == ["c_attn", "attn.c_proj", "mlp.c_proj", "lm_head"]
    assert [label.get_text() for label in rank.get_xticklabels()] == ["0", "1", "2", "\u2013"]
    assert sorted(texts(share)) == sorted(["20", "50", "80"] * 2 + ["20", "80", "99"])
    assert sorted(texts(rank)) == sorted(["4", "8", "12"] * 2 + ["4", "12", "128"])
    assert rank.get_xlabel() == "layer (\u2013: outside the layers; grey: no change there)"


def test_one_rank_needs_no_second_map():
    figure = energy_figure(report({"h.0.q": (4, 1.0), "h.1.q": (4, 0.9)}))
    assert len(figure.axes) == 2  # the map and its scale
    assert "rank 4" in figure.get_suptitle()
    assert texts(figure.axes[0]) == ["100", "90"]


@pytest.mark.parametrize("layers", [2, 12, 39, 80])
def test_no_label_covers_another(layers):
    modules = {f"h.{n}.{k}_proj": (100 + n, 0.5) for n in range(layers) for k in ("q", "a_rather_long", "o")}
    figure = energy_figure(report(modules, name="an expert of a rather long name, as they come from the Hub"))
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    for axes in figure.axes[:2]:
        for labels in (axes.get_xticklabels(), axes.get_yticklabels(), axes.texts):
            boxes = [label.get_window_extent(renderer) for label in labels if label.get_text()]
            assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[i + 1 :])
    title = figure._suptitle.get_window_extent(renderer)
    assert title.x0 >= 0
    assert title.x1 <= figure.bbox.x1
    assert title.y0 >= figure.axes[0].get_window_extent(renderer).y1


def test_cells_of_several_modules_show_them_together():
    modules = {f"h.0.experts.{n}.w": (n + 1, 0.1 * n) for n in range(3)}
    figure = energy_figure(report(modules))
    assert texts(figure.axes[0]) == ["10"]
    assert texts(figure.axes[1]) == ["2"]


def test_png_and_svg(tmp_path):
    png = write_energy_map(report(GPT2, "a $ b"), tmp_path / "new" / "energy.png")
    assert png.read_bytes().startswith(b"\x89PNG")
    svgs = [write_energy_map(report(GPT2), tmp_path / f"{n}.svg").read_text() for n in "ab"]
    assert svgs[0] == svgs[1]
    assert re.search("<svg", svgs[0])
