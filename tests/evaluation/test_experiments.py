"""Evaluation: records that survive a kill, decisions in scoring, similarity, finding experts, and the commands."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest
import torch

from models import close, dense_deltas, peft_adapter, peft_library, random_factors, write_adapter
from questions import CHOICES, EXAMPLES, PROMPTS
from spectr import Calibrated, ExpertLibrary, Oracle, Spectr, build_index, calibrate, compose, get_router, trace
from spectr.errors import DataError
from spectr.evaluation import choice_logprobs, routed_logprobs
from spectr.evaluation.experiments import EXPERIMENTS, ExperimentSetup, Result
from spectr.evaluation.experiments.similarity import cosines, mean_cosines
from spectr.evaluation.expert_recall import find_experts
from spectr.evaluation.score import Measurement, score_examples
from spectr.models import encode_batch
from spectr.tasks import Example, Task
from text_model import make_model, make_tokenizer

RANKS = {"ants": 4, "bees": 2, "cats": 4}


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    plain = peft_library(make_model(), tmp_path_factory.mktemp("experts"), RANKS)
    return plain.with_calibration(calibrate(make_model(), plain, make_tokenizer(), samples=3, null=0))


def test_a_measurement_is_mean_and_standard_error():
    found = Measurement.of([1.0, 0.0, 1.0, 1.0])
    assert (found.value, found.count) == (0.75, 4)
    assert found.error == pytest.approx((0.75 * 0.25 / 3) ** 0.5)


# Records


def test_records_are_those_of_the_choices(tmp_path):
    records = score_examples(make_model(), make_tokenizer(), EXAMPLES)
    for record, scores, example in zip(
        records, choice_logprobs(make_model(), make_tokenizer(), EXAMPLES), EXAMPLES, strict=True
    ):
        assert record["logprobs"] == pytest.approx(scores.tolist(), abs=1e-4)
        assert record["prediction"] == int(scores.argmax())
        assert record["right"] == (record["prediction"] == example.label)


@pytest.mark.parametrize("cut", [0, 5])
def test_a_killed_run_goes_on_and_scores_nothing_twice(tmp_path, monkeypatch, cut):
    import spectr.evaluation.score as module

    monkeypatch.setattr(module, "_CHUNK", 2)
    path, whole = tmp_path / "records.jsonl", score_examples(make_model(), make_tokenizer(), EXAMPLES)
    seen = []

    def dies(count):
        seen.append(count)
        if sum(seen) >= 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score_examples(make_model(), make_tokenizer(), EXAMPLES, keep=path, progress=dies)
    if cut:
        path.write_text(path.read_text()[:-cut])
    again = []
    records = score_examples(make_model(), make_tokenizer(), EXAMPLES, keep=path, progress=again.append)
    assert again[0] == (3 if cut else 4)
    assert [record["prediction"] for record in records] == [record["prediction"] for record in whole]
    assert len(path.read_text().splitlines()) == 1 + len(EXAMPLES)


def test_records_of_another_run_are_not_taken(tmp_path):
    path = tmp_path / "records.jsonl"
    score_examples(make_model(), make_tokenizer(), EXAMPLES, keep=path, origin={"router": "a"})
    seen = []
    score_examples(make_model(), make_tokenizer(), EXAMPLES, keep=path, origin={"router": "b"}, progress=seen.append)
    assert seen[0] == 0


def test_scoring_by_prompts_is_scoring_each_with_its_own_expert(library):
    model, tokenizer = make_model(), make_tokenizer()
    routed = compose(model, library, Calibrated())
    scores, weights_NE = routed_logprobs(model, tokenizer, EXAMPLES, routed.prompt)
    records = score_examples(model, tokenizer, EXAMPLES, decision=routed.prompt)
    assert len({int(row.argmax()) for row in weights_NE}) > 1, "a test in which all prompts go one way tests little"
    for example, score_C, row, record in zip(EXAMPLES, scores, weights_NE, records, strict=True):
        expert = routed.experts[int(row.argmax())]
        alone = make_model()
        compose(alone, library, Oracle(expert=expert))
        [slow] = choice_logprobs(alone, tokenizer, [example])
        close(score_C, slow, 1e-4)
        assert record["experts"] == {expert: 1.0}


# Similarity


def test_cosines_are_those_of_the_dense_updates(tmp_path):
    library = peft_library(make_model(), tmp_path, {"ants": 4, "bees": 2, "cats": 8})
    deltas = {name: dense_deltas(tmp_path / name) for name in library}
    for module, table in cosines(library).items():
        flat = torch.stack([deltas[name][module].flatten() for name in library])
        flat = flat / flat.norm(dim=1, keepdim=True)
        close(table, flat @ flat.T)


def test_modules_that_only_one_adapts_do_not_count(tmp_path):
    peft_adapter(make_model(), tmp_path / "ants", 1)
    peft_adapter(make_model(), tmp_path / "few", 2, targets=["q_proj"])
    by_module = cosines(ExpertLibrary.open(tmp_path))
    queries = [table for name, table in by_module.items() if name.endswith("q_proj")]
    assert float(mean_cosines(by_module)[0, 1]) == pytest.approx(float(torch.stack(queries).mean(0)[0, 1]))
    assert torch.isnan(by_module["model.layers.0.self_attn.v_proj"][0, 1])


def test_one_expert_is_like_nobody(tmp_path):
    with pytest.raises(DataError, match="at least two experts"):
        cosines(peft_library(make_model(), tmp_path, {"ants": 4}))


# Finding the right expert


def test_finding_counts_tokens_and_votes(library):
    model, tokenizer = make_model(), make_tokenizer()
    routed = compose(model, library, Spectr(top_k=2))
    for prompt in PROMPTS[:3]:
        [found] = find_experts(model, routed, tokenizer, [prompt], "bees", skip=1)
        with trace(model) as record:
            model(**encode_batch(tokenizer, [prompt]))
        firsts, votes = [], dict.fromkeys(RANKS, 0)
        for layer in record.values():
            for token in layer.scores[0, 1:]:
                best = layer.experts[int(token.argmax())]
                firsts.append(best == "bees")
                votes[best] += 1
        assert found.top_1 == pytest.approx(sum(firsts) / len(firsts))
        assert found.top_4 == 1.0
        assert found.winner == max(votes, key=lambda name: votes[name])
        assert found.place == 1 + sum(votes[name] > votes["bees"] for name in RANKS)


def test_a_batch_of_prompts_is_found_like_its_members(library):
    model, tokenizer = make_model(), make_tokenizer()
    routed = compose(model, library, Calibrated())
    together = find_experts(model, routed, tokenizer, PROMPTS, "cats", skip=1)
    for prompt, found in zip(PROMPTS, together, strict=True):
        [alone] = find_experts(model, routed, tokenizer, [prompt], "cats", skip=1)
        assert (found.winner, found.place) == (alone.winner, alone.place)
        [row] = routed.prompt.decide(**encode_batch(tokenizer, [prompt]))
        assert found.winner == routed.experts[int(row.argmax())]


def test_which_prompts_the_base_model_would_answer(library):
    model, tokenizer = make_model(), make_tokenizer()
    ordinary = [encode_batch(tokenizer, [prompt])["input_ids"][0].tolist() for prompt in PROMPTS]
    nulled = library.with_calibration(dataclasses.replace(library.calibration, null=ordinary * 8))
    for known, router in ((nulled, Calibrated()), (nulled, Calibrated(level="prior")), (library, Calibrated())):
        routed = compose(model, known, router)
        read = [routed.prompt.find(**encode_batch(tokenizer, [prompt])).p_B for prompt in PROMPTS]
        for p_B, found in zip(read, find_experts(model, routed, tokenizer, PROMPTS, "cats"), strict=True):
            assert found.p == (None if known is library else pytest.approx(float(p_B)))
            assert found.to_base == pytest.approx(float("nan") if known is library else float(p_B > 0.05), nan_ok=True)
        routed.remove()


# The experiments, whole


@pytest.fixture(scope="module")
def tasks():
    def task(name):
        return Task.of(name=name, version=1, prompt="{x}", choices=CHOICES)

    return {name: (task(name), EXAMPLES[:4]) for name in ("ants", "bees", "unknown")}


@pytest.mark.parametrize("name", EXPERIMENTS.entries)
def test_every_experiment_gives_a_table_a_picture_and_the_model_back(library, tasks, tmp_path, name):
    from spectr.plots.axes import as_svg
    from spectr.plots.figures import figure

    model = make_model()
    before = model(torch.tensor([[1, 5, 9]])).logits
    other = [Example(prompt=f"the {e.prompt}", answer=e.answer, choices=e.choices, label=e.label) for e in EXAMPLES[:4]]
    bench = ExperimentSetup(
        model=model,
        tokenizer=make_tokenizer(),
        library=library,
        tasks=tasks,
        reworded={task: [EXAMPLES[:4], other] for task in tasks},
        folder=tmp_path,
        seeds=(0, 1),
        ranks={4: library.without("bees"), 8: library.without("bees")},
        substitutes=[("bees in place of ants", "ants", library["bees"].weights.parent)],
        held_out={"unknown": tasks["unknown"]},
    )
    result = EXPERIMENTS.load(name)(bench)
    assert torch.equal(model(torch.tensor([[1, 5, 9]])).logits, before)
    loaded = Result.load(result.save(tmp_path))
    assert loaded.name == name
    assert all(len(row) == len(loaded.columns) for row in loaded.rows)
    assert set(loaded.origin["experts"]) == set(RANKS)
    drawing = as_svg(figure(loaded))
    assert drawing.startswith("<svg")
    assert drawing == as_svg(figure(loaded))


COMPARING = [name for name in EXPERIMENTS.entries if name not in ("quality", "similarity", "agreement")]


@pytest.mark.parametrize("name", COMPARING)
def test_a_router_that_an_experiment_does_not_know_is_compared_when_it_is_asked_for(library, tasks, tmp_path, name):
    """Without an index it is said to lack one; with one it is there, with the library's own calibration."""
    bench = ExperimentSetup(
        model=make_model(),
        tokenizer=make_tokenizer(),
        library=library,
        tasks=tasks,
        reworded={task: [EXAMPLES[:4]] for task in tasks},
        folder=tmp_path,
        only=["shortlist"],
        seeds=(0, 1),
        ranks={4: library.without("bees")},
        held_out={"unknown": tasks["unknown"]},
    )
    without = EXPERIMENTS.load(name)(bench)
    assert any("Left out for lack of an index" in note and "shortlist" in note for note in without.notes)
    if name in ("ranks", "robustness"):  # whose libraries are made while they run: without an index
        return
    indexed = EXPERIMENTS.load(name)(dataclasses.replace(bench, library=build_index(make_model(), library)))
    assert any("shortlist" in map(str, row) for row in indexed.rows)
    assert not any("Left out" in note for note in indexed.notes)


def test_examples_are_dealt_out_among_the_paraphrases(library, tasks, tmp_path):
    bench = ExperimentSetup(
        model=make_model(),
        tokenizer=make_tokenizer(),
        library=library,
        tasks=tasks,
        reworded={"ants": [EXAMPLES[:4], EXAMPLES[2:6]], "bees": []},
        folder=tmp_path,
    )
    dealt = bench.paraphrased().tasks
    assert set(dealt) == {"ants"}
    assert dealt["ants"][1] == [EXAMPLES[0], EXAMPLES[3], EXAMPLES[2], EXAMPLES[5]]


Q, K = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.k_proj"
SCALED = [({}, 8, 8), ({"use_rslora": True}, 16 / 2**0.5, 16 / 2**0.5)]
SCALED += [({"rank_pattern": {K: 3}, "alpha_pattern": {K: 5}}, 8, 5 / 3)]


@pytest.mark.parametrize(("more", "of_q", "of_k"), SCALED)
def test_a_changed_expert_is_the_same_update(tmp_path, more, of_q, of_k):
    """Rank 64 changes nothing, a hundred times the size changes that alone."""
    from spectr.evaluation.experiments.robustness import _CASES, changed_expert

    factors = {Q: random_factors(2, 32, 32, 1), K: random_factors(3 if "rank_pattern" in more else 2, 32, 16, 2)}
    library = ExpertLibrary.from_adapters({"ants": write_adapter(tmp_path / "ants", factors, **more)})
    plain = {name: scale * (factors[name][1] @ factors[name][0]).double() for name, scale in ((Q, of_q), (K, of_k))}
    for number, (case, factor) in enumerate(zip(list(_CASES)[:2], (100, 1), strict=True)):
        folder = tmp_path / str(number)
        changed = dense_deltas(changed_expert(library, "ants", folder, _CASES[case]))
        for module, delta in plain.items():
            close(changed[module], factor * delta, 1e-4)


def test_records_name_the_router_by_its_config_and_older_ones_are_read(library, tasks, tmp_path, monkeypatch):
    def run(folder):
        bench = ExperimentSetup(
            model=make_model(),
            tokenizer=make_tokenizer(),
            library=library,
            tasks=tasks,
            folder=folder,
            only=["mu"],
        )
        for name in ("multitask", "routing"):
            EXPERIMENTS.load(name)(bench)
        return {path.name: path.read_text() for path in (folder / "records").iterdir()}

    with monkeypatch.context() as older:
        older.setattr("spectr.evaluation.experiments.setup._written", str)
        before = run(tmp_path / "old")
    assert run(tmp_path / "old") == before  # nothing was scored or looked for again
    origins = []
    for name, text in run(tmp_path / "new").items():
        origins.append(json.loads(text.splitlines()[0] if name.endswith(".jsonl") else text)["origin"])
    routers = [origin["router"] for origin in origins]
    assert {"name": "uniform"} in routers
    assert all(router is None or router["name"] in ("uniform", "oracle") for router in routers)


def test_results_name_the_evidence_with_settings_that_no_config_has(library, tasks, tmp_path, monkeypatch):
    bench = ExperimentSetup(
        model=make_model(), tokenizer=make_tokenizer(), library=library, tasks=tasks, folder=tmp_path
    )
    with bench.routed(get_router("calibrated")) as routed:
        bench.find(routed, "routing: calibrated")
        before = {path.name: path.read_text() for path in (tmp_path / "records").iterdir()}
        monkeypatch.setattr(type(routed.policy.evidence), "__str__", lambda evidence: "of another version")
        bench.find(routed, "routing: calibrated")
    assert len(before) == len(bench.owned)
    assert all((tmp_path / "records" / name).read_text() != text for name, text in before.items())


def test_the_oracle_is_the_measure_of_the_multitask_table(library, tasks, tmp_path):
    bench = ExperimentSetup(
        model=make_model(), tokenizer=make_tokenizer(), library=library, tasks=tasks, folder=tmp_path
    )
    methods = EXPERIMENTS.load("multitask")(bench).data["methods"]
    own = methods["its own expert"]
    for name, found in methods.items():
        expected = [found["accuracy"][t] / max(own["accuracy"][t], 1e-9) for t in ("ants", "bees")]
        assert found["share"] == pytest.approx(sum(expected) / 2), name
        for task, share in found["shares"].items():
            assert share == pytest.approx(found["accuracy"][task] / own["accuracy"][task], nan_ok=True), name
    assert "arrow, k 4" not in methods, "there are three experts"
    assert (methods["spectr, k 2"]["merge"], methods["spectr, k 2"]["weights"]) == ("outputs", "uniform")
    assert "mu, combine raw-factors" not in methods, "their ranks differ"


def test_the_formula_of_costs_is_what_is_measured(library, tmp_path):
    bench = ExperimentSetup(model=make_model(), tokenizer=make_tokenizer(), library=library, tasks={}, folder=tmp_path)
    found = EXPERIMENTS.load("costs")(bench).data["routers"]
    assert set(found) == {"mu", "calibrated-prior, k 1", "calibrated", "lag, shortlist 3, k 1"}
    for name, router in found.items():
        if not name.startswith("lag"):  # whose experts of unequal ranks are taken as the tokens want them
            assert router["flops"] == pytest.approx(router["formula"])
    assert found["calibrated"]["formula"] < found["mu"]["formula"]


# The commands


def test_calibrate_evaluate_and_report_from_the_command_line(spectr, tmp_path):
    from text_model import save_experts, save_model, save_rows

    model = save_model(tmp_path / "model")
    adapters = save_experts(tmp_path / "adapters", ("amber", "blue"))
    rows = save_rows(tmp_path / "rows.jsonl", 8)
    task = tmp_path / "colours.yaml"
    task.write_text(
        "name: colours\nversion: 1\nexpert: blue\nprompt: what is the colour of the {thing}\n"
        f"choices: [green, blue]\ntest: {rows}\n"
    )
    given = ("--model", model, "--library", adapters, "--dtype", "float32")
    code, _, message = spectr("generate", "what", "-r", "calibrated", *given)
    assert code == 2
    assert "not calibrated: amber, blue" in message
    code, text, _ = spectr("library", "calibrate", "--samples", 2, "--tokens", 8, *given)
    assert code == 0
    assert "calibrated 2 experts" in text
    always = ("-r", "calibrated", "--set", "abstain=none")
    code, text, _ = spectr("generate", "what is it", "--json", "-n", 2, *always, *given)
    assert code == 0
    assert sorted(json.loads(text)["experts"].values()) == [0.0, 1.0]
    out = tmp_path / "out"
    for experiment in ("routing", "quality"):
        code, text, _ = spectr("evaluate", experiment, "--task", task, "--out", out, *given)
        assert code == 0, text
        assert "colours" in (out / f"{experiment}.json").read_text()
    code, text, _ = spectr("report", "--out", out)
    assert code == 0
    assert "The routers side by side" in text
    page = (out / "report.html").read_text()
    assert page.index("The routers side by side") < page.index("The value of each expert")
    assert "Which router finds the right expert" in page
    assert not re.search(r"""(src|href)=["']?https?:""", page)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("evaluate", "qualty"), "did you mean 'quality'?"),
        (("evaluate", "quality", "--data-root", "/no"), "no data file at /no/"),
        (("report", "--out", "nowhere"), "run spectr evaluate all first"),
        (("library", "calibrate", "-l", "nowhere"), "there is no library folder nowhere"),
    ],
)
def test_mistakes_get_one_message(spectr, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    code, text, notes = spectr(*words)
    assert code == 2
    assert text == ""
    assert message in " ".join(notes.split())
