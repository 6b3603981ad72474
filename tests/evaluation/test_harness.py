"""The lm-evaluation-harness as a differential peer: on the same prompts its numbers are ours."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from importlib.metadata import entry_points

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model

from guided import embed
from spectr import ExpertLibrary, calibrate, compose, get_router
from spectr.errors import CompositionError
from spectr.evaluation import choice_logprobs, harness, routed_logprobs
from spectr.evaluation.harness import SpectrLM
from spectr.library.description_file import write_descriptions
from spectr.tasks import Example
from text_model import make_model, make_tokenizer, save_experts, save_model

CHOICES = ("yes", "no", "a good film")
PROMPTS = ["what is it", "is the grass blue", "who", "a good film of the sky is the x", "is it red", "the z of y"]
EXAMPLES = [Example(prompt=prompt, answer="yes", choices=CHOICES, label=0) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    save_model(root / "model")
    save_experts(root / "experts", ("amber", "blue", "cyan"))
    library = ExpertLibrary.open(root / "experts")
    calibrate(make_model(), library, make_tokenizer(), samples=3, null=0).save(root / "experts")
    return root


def requests():
    """As a task of the harness would ask: the rendered chat, then each choice with the end of the sequence."""
    tokenizer = make_tokenizer()
    found = []
    for example in EXAMPLES:
        turn = [{"role": "user", "content": example.prompt}]
        context = str(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)).rstrip()
        for choice in example.choices:
            found.append(Instance("loglikelihood", {}, (context, f" {choice} </s>"), len(found)))
    return found


def ours(world, router):
    model, tokenizer = make_model(), make_tokenizer()
    if router == "base":
        return choice_logprobs(model, tokenizer, EXAMPLES)
    routed = compose(model, ExpertLibrary.open(world / "experts"), get_router(router, top_k=1))
    if routed.prompt is None:
        return choice_logprobs(model, tokenizer, EXAMPLES)
    scores, weights_NE = routed_logprobs(model, tokenizer, EXAMPLES, routed.prompt)
    assert len({int(row.argmax()) for row in weights_NE}) > 1
    return scores


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("router", ["base", "spectr", "calibrated"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])  # the harness says cuda, whether there is one or not
def test_its_numbers_are_ours(world, router, device):
    more = {} if router == "base" else {"top_k": 1}
    model = get_model("spectr")(
        base=str(world / "model"),
        library=str(world / "experts"),
        router=router,
        dtype="float32",
        device=device,
        batch_size=4,
        **more,
    )
    assert isinstance(model, SpectrLM)
    theirs = torch.tensor([value for value, _ in model.loglikelihood(requests(), disable_tqdm=True)])
    torch.testing.assert_close(theirs.view(len(EXAMPLES), -1), torch.stack(ours(world, router)), atol=1e-4, rtol=1e-5)


def test_a_guided_router_brings_its_guide(world, monkeypatch):
    words = {"amber": "red", "blue": "blue sky", "cyan": "green"}
    write_descriptions(world / "experts", words)
    monkeypatch.setattr("spectr.guidance.load_embedder", lambda: embed)
    given = {"base": str(world / "model"), "library": str(world / "experts"), "dtype": "float32", "batch_size": 4}
    model = SpectrLM(router="glider-global", **given)
    found = torch.tensor([value for value, _ in model.loglikelihood(requests(), disable_tqdm=True)])
    assert torch.isfinite(found).all()
    assert model.routed.guide.spent.prompts == len(EXAMPLES)


def test_a_mistake_is_reported_before_a_model_is_loaded(world):
    with pytest.raises(CompositionError, match="did you mean 'arrow'"):
        SpectrLM(base="/no/model", library=str(world / "experts"), router="arow")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"temperature": 0.01, "tempratur": 3}, "has tempratur\n  to do: did you mean 'temperature'"),
        (
            {"bach_size": 4},
            "neither the router 'arrow' nor the harness' HFLM has bach_size\n  to do: did you mean 'batch_",
        ),
        ({"temperature": "hot"}, "temperature=hot\n  expected: a number"),
        ({"temperature": -1.0}, "temperature=-1.0"),
    ],
)
def test_a_wrong_setting_is_refused_before_a_model_is_loaded(world, given, message):
    with pytest.raises(CompositionError) as caught:
        SpectrLM(base="/no/model", library=str(world / "experts"), router="arrow", **given)
    assert message in str(caught.value)


def test_settings_go_to_the_router_and_the_rest_to_the_harness():
    given = {"temperature": 0.01, "weights": "uniform", "batch_size": 4}
    assert harness._settings("arrow", given) == {"temperature": 0.01, "weights": "uniform"}
    assert given == {"batch_size": 4}


def test_as_a_script_it_reports_what_is_missing(monkeypatch, capsys):
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "spectr.evaluation.harness")
    with pytest.raises(SystemExit, match="2"):
        runpy.run_module("spectr.evaluation.harness", run_name="__main__")
    assert capsys.readouterr().err.startswith("error: lm-evaluation-harness needs the extra 'harness'")


def test_the_entry_point_is_the_model():
    [point] = [point for point in entry_points(group="lm_eval.models") if point.name == "spectr"]
    assert point.load() is SpectrLM


def test_the_command_evaluates_a_task(world, tmp_path):
    """A fresh process, which registers the module's class and not the script's, on two rows without a network."""
    rows = [{"prompt": "what is it", "label": 0}, {"prompt": "is the grass blue", "label": 1}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    task = {
        "task": "tiny",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{prompt}}",
        "doc_to_choice": ["yes", "no"],
        "doc_to_target": "label",
    }
    (tmp_path / "tiny.yaml").write_text(json.dumps(task), encoding="utf-8")  # YAML takes JSON
    script = """
import runpy
import lm_eval.__main__
from lm_eval.api.registry import get_model
evaluate = lm_eval.__main__.cli_evaluate
lm_eval.__main__.cli_evaluate = lambda: (print("class of", get_model("spectr").__module__), evaluate())
runpy.run_module("spectr.evaluation.harness", run_name="__main__", alter_sys=True)
"""
    command = [sys.executable, "-c", script, "--model", "spectr", "--tasks", "tiny"]
    command += ["--model_args", f"base={world / 'model'},library={world / 'experts'},router=calibrated,dtype=float32"]
    command += ["--include_path", str(tmp_path), "--output_path", str(tmp_path / "results.json")]
    alone = {"HF_DATASETS_CACHE": str(tmp_path / "cache"), "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | alone)
    assert done.returncode == 0, done.stderr
    assert "class of spectr.evaluation.harness\n" in done.stdout
    [found] = tmp_path.glob("results*.json")
    results = json.loads(found.read_text(encoding="utf-8"))
    assert results["config"]["model"] == "spectr"
    assert results["results"]["tiny"]["acc,none"] in (0, 0.5, 1)


def test_the_command_reports_a_mistake_without_a_traceback(monkeypatch, capsys):
    def mistaken():
        raise CompositionError("no such router", do="name another one")

    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", mistaken)
    with pytest.raises(SystemExit, match="2"):
        harness.main()
    assert capsys.readouterr().err == "error: no such router\n  to do: name another one\n"
