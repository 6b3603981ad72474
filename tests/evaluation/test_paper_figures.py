"""The paper's figures and tables as it defines them: ratios of scores, similarity in both readings, tables by task."""

from __future__ import annotations

import math

import pytest
import torch

from models import close, peft_library, random_factors
from questions import CHOICES, EXAMPLES
from spectr import Arrow, Calibrated, Spectr, calibrate, compose, trace
from spectr.adapters import Factors
from spectr.errors import CompositionError, DataError
from spectr.evaluation.experiments import EXPERIMENTS, ExperimentSetup, Result
from spectr.evaluation.experiments.similarity import cosines, mean_with_others, raw_products
from spectr.evaluation.expert_recall import find_experts, score_ratios
from spectr.models import encode_batch
from spectr.plots.pages import write_report
from spectr.tasks import Task
from text_model import make_model, make_tokenizer

PROMPTS = [example.prompt for example in EXAMPLES[:3]]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    plain = peft_library(make_model(), tmp_path_factory.mktemp("experts"), dict.fromkeys(("ants", "bees", "cats"), 4))
    return plain.with_calibration(calibrate(make_model(), plain, make_tokenizer(), samples=3, null=0))


@pytest.fixture
def setup(library, tmp_path):
    tasks = {
        name: (Task.of(name=name, version=1, prompt="{x}", choices=CHOICES), EXAMPLES[:3]) for name in ("ants", "bees")
    }
    return ExperimentSetup(
        model=make_model(),
        tokenizer=make_tokenizer(),
        library=library,
        tasks=tasks,
        folder=tmp_path,
        ranks={4: library},
    )


def test_a_ratio_is_the_right_experts_score_over_the_largest():
    scores_TE = torch.tensor([[2.0, 4.0], [3.0, 1.0], [0.0, 0.0], [-1.0, 2.0], [-3.0, -1.0], [-1.0, -3.0]])
    assert score_ratios(scores_TE, 0).tolist() == [0.5, 1.0, 1.0, 0.0, 0.0, 1.0]


@pytest.mark.parametrize("router", [Arrow(top_k=1), Spectr(top_k=1)], ids=lambda router: type(router).__name__)
def test_a_finding_has_the_mean_ratio_over_tokens_and_modules(library, router):
    """Prompt by prompt, so that no token is padding, and by loops."""
    model, tokenizer = make_model(), make_tokenizer()
    routed = compose(model, library, router)
    found = find_experts(model, routed, tokenizer, PROMPTS, "bees", skip=1)
    for prompt, finding in zip(PROMPTS, found, strict=True):
        with trace(model) as record, torch.no_grad():
            model(**encode_batch(tokenizer, [prompt]))
        ratios = [
            float(scores[layer.experts.index("bees")] / scores.max())
            for layer in record.values()
            for scores in layer.scores[0, 1:]
        ]
        assert finding.ratio == pytest.approx(sum(ratios) / len(ratios), abs=1e-4)
        assert finding.top_1 <= finding.ratio <= 1


def test_a_decision_for_the_prompt_has_no_ratio(library):
    model = make_model()
    routed = compose(model, library, Calibrated())
    [finding] = find_experts(model, routed, make_tokenizer(), PROMPTS[:1], "bees")
    assert math.isnan(finding.ratio)


def test_ranks_give_the_ratio_by_rank_and_router(setup):
    found = EXPERIMENTS.load("ranks")(setup)
    assert found.columns[2:] == ["score, of the largest", "tokens, first", "prompts, by vote"]
    by_rank = found.data["routers"]["spectr, k 1"]
    assert set(by_rank["4"]) == {"ratio", "tokens", "prompts"}
    assert by_rank["4"]["tokens"][0] <= by_rank["4"]["ratio"][0] <= 1


def test_cosines_of_the_factors_are_those_of_the_files_numbers():
    pairs = [Factors(*random_factors(3, 8, 6, seed), 2.0 + seed) for seed in range(3)]
    vectors = [torch.cat([pair.A.flatten(), pair.B.flatten()]).double() for pair in pairs]
    close(raw_products(pairs), torch.stack([torch.stack([a @ b for b in vectors]) for a in vectors]), 1e-9)
    uneven = raw_products([pairs[0], Factors(*random_factors(2, 8, 6, 9), 1.0)])
    assert uneven.isnan().tolist() == [[False, True], [True, False]]


def test_the_factors_of_experts_with_one_initial_matrix_are_alike_and_their_updates_are_not(library):
    A, _ = random_factors(4, 64, 64, 0)
    pairs = [Factors(A, 0.01 * random_factors(4, 64, 64, seed)[1], 1.0) for seed in (1, 2)]
    raw = raw_products(pairs)
    assert float(raw[0, 1] / (raw[0, 0] * raw[1, 1]).sqrt()) > 0.99
    apart = mean_with_others(torch.stack(list(cosines(library).values())).nanmean(0))
    assert apart.shape == (3,)
    assert float(apart.abs().max()) < 0.5


def test_the_mean_with_the_others_leaves_the_expert_itself_out():
    table = torch.tensor([[1.0, 0.2, 0.4], [0.2, 1.0, float("nan")], [0.4, float("nan"), 1.0]])
    close(mean_with_others(table), torch.tensor([0.3, 0.2, 0.4]))


def test_routing_has_tables_by_task_and_they_are_on_the_page(setup, tmp_path):
    found = EXPERIMENTS.load("routing")(setup)
    assert [table.columns for table in found.more] == [["router", "ants", "bees", "all"]] * 2
    for what, table in zip(("top_4", "top_1"), found.more, strict=True):
        for label, *cells in table.rows:
            shares = [found.data["per_task"][label][task][what] for task in ("ants", "bees")]
            shown = [float(cell.partition("%")[0]) / 100 for cell in cells]
            assert shown == pytest.approx([*shares, sum(shares) / 2], abs=6e-4)
    loaded = Result.load(found.save(tmp_path))
    assert loaded.more == found.more
    page = write_report([loaded], tmp_path / "page.html", title="all").read_text(encoding="utf-8")
    assert all(table.title in page for table in found.more)
    assert set(found.data["similarity"]) == {"ants", "bees"}


def test_results_of_an_older_version_are_refused_by_name(tmp_path):
    old = Result(name="ranks", title="", source="", columns=[], rows=[], data={"routers": {"arrow": {"8": [0.1, 0.2]}}})
    with pytest.raises(DataError, match="the results of 'ranks' lack"):
        write_report([old], tmp_path / "page.html", title="all")


def test_mean_scores_are_over_the_layers_that_hold_all_experts(library):
    model = make_model()
    compose(model, library, Spectr(top_k=2))
    with trace(model) as record, torch.no_grad():
        model(torch.tensor([[1, 5, 9]]))
    close(record.mean_scores(), torch.stack([layer.scores for layer in record.values()]).mean(0))
    with trace(model) as empty, pytest.raises(CompositionError, match="no layers hold all experts"):
        empty.mean_scores()
