"""The command line as its user meets it: what is printed where, exit codes, and the obvious mistakes."""

import json

import pytest
import typer

from spectr.combine import COMBINATIONS
from spectr.evaluation.experiments import EXPERIMENTS
from spectr.merging.method import METHODS
from spectr.routers.registries import ROUTERS
from spectr.serving.engines.launchers import ENGINES
from text_model import make_model, make_tokenizer, save_experts, save_model, save_rows

NAMES = ("amber", "blue", "cyan")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    save_model(root / "model")
    save_experts(root / "adapters", NAMES)
    return root


@pytest.fixture
def given(world):
    """The options that name the tiny model and its experts."""
    return ("--model", world / "model", "--library", world / "adapters", "--dtype", "float32")


def test_help_names_every_command_and_the_first_step(spectr):
    code, text, _ = spectr("--help")
    assert code == 0
    for command in ("demo", "generate", "chat", "route", "train", "library", "spectr demo"):
        assert command in text


COMMANDS = ["demo", "generate", "chat", "route", "train", "train gates", "merge", "extract", "rerank", "evaluate"]
COMMANDS += ["report", "library"]
COMMANDS += [
    f"library {name}" for name in ("add", "check", "remove", "list", "show", "verify", "calibrate", "describe")
]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(spectr, command):
    code, text, notes = spectr(*command.split(), "--help")
    assert (code, notes) == (0, "")
    assert f"spectr {command}" in text


VERBS = """Add Allow Answer Ask Calibrate Chat Check Choose Combine Compare Copy Count Decode Delete Describe Draw
Embed Extract Give Hold Index Install Keep Leave Let Limit List Listen Load Lower Manage Measure Merge
Multiply Name Offer Pass Print Read Refine Remove Replace Resolve Route Run Sample Scale Serve Set Show
Stop Store Subtract Take Time Train Turn Use Weight Write"""


def test_help_texts_start_with_a_verb():
    from spectr.cli.app import app

    def texts(command):
        yield command.help
        yield from (option.help for option in command.params if getattr(option, "help", None))
        for inner in getattr(command, "commands", {}).values():
            yield from texts(inner)

    first = {text.split()[0] for text in texts(typer.main.get_command(app))}
    assert first - set(VERBS.split()) == set()


@pytest.mark.parametrize(
    ("command", "registry"),
    [
        ("generate", ROUTERS),
        ("generate", COMBINATIONS),
        ("merge", METHODS),
        ("evaluate", EXPERIMENTS),
        ("serve", ENGINES),
    ],
)
def test_help_lists_every_name_of_a_registry(spectr, command, registry):
    text = " ".join(spectr(command, "--help")[1].replace("\u2502", " ").split())
    assert [name for name in registry.entries if name not in text] == []


def test_version(spectr):
    from spectr import __version__

    assert spectr("--version")[:2] == (0, f"spectr {__version__}\n")


def test_generate_prints_the_answer_alone_on_standard_output(spectr, given):
    code, text, progress = spectr("generate", "what is it", "-k", 2, "-n", 3, *given)
    assert code == 0
    assert len(text.split()) <= 3
    assert "experts used" in progress


def test_generate_json_is_one_object_with_shares_that_sum_to_one(spectr, given):
    code, text, _ = spectr("generate", "-", "--json", "-n", 3, *given, stdin="what is the sky\n")
    data = json.loads(text)
    assert code == 0
    assert data["prompt"] == "what is the sky"
    assert sum(data["experts"].values()) == pytest.approx(1, abs=1e-4)
    assert tuple(sorted(data["experts"])) == NAMES


def test_without_top_k_a_small_library_is_used_whole(spectr, given):
    _, text, _ = spectr("generate", "what", "--json", "-n", 1, *given)
    assert "top_k=3" in json.loads(text)["router"]


def test_allow_restricts(spectr, given):
    _, text, _ = spectr("generate", "what", "--json", "-n", 1, "--allow", "blue", *given)
    assert json.loads(text)["experts"] == {"blue": pytest.approx(1.0)}


def test_oracle_takes_its_expert(spectr, given):
    _, text, _ = spectr("generate", "what", "--json", "-n", 1, "-r", "oracle", "-e", "cyan", *given)
    assert json.loads(text)["experts"] == {"cyan": pytest.approx(1.0)}


def test_route_writes_the_page_and_the_picture(spectr, given, tmp_path):
    page, picture = tmp_path / "new" / "page.html", tmp_path / "picture.png"
    code, text, _ = spectr("route", "what is it", "--html", page, "--png", picture, *given)
    assert code == 0
    assert "what" in text
    assert "of the weight" in text
    assert str(page) in text
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "http" not in page.read_text().replace("http-equiv", "")


def test_route_json_holds_weights_by_layer_token_and_expert(spectr, given):
    _, text, _ = spectr("route", "what is it", "--json", "-k", 1, *given)
    data = json.loads(text)
    assert data["layers"] == ["all layers", "layer 0", "layer 1"]
    assert len(data["weights"]) == 3
    assert len(data["weights"][0]) == len(data["tokens"])
    for token in data["weights"][0]:
        assert sum(token) == pytest.approx(1, abs=1e-3)


def test_route_of_one_layer(spectr, given):
    assert "colours: layer 1" in spectr("route", "what is it", "--layer", "1", *given)[1]
    code, _, message = spectr("route", "what is it", "--layer", "9", *given)
    assert code == 2
    assert "unknown layer '9'" in message


def test_chat_answers_and_obeys_its_commands(spectr, given):
    lines = "what is it\n/experts\n/allow blue\n/allow nobody\n/new\n/what\n/quit\n"
    code, _, notes = spectr("chat", "-n", 2, *given, stdin=lines)
    assert code == 0
    assert "amber, blue, cyan" in notes
    assert "allowed: blue" in notes
    assert "unknown expert 'nobody'" in notes


def test_chat_samples_by_its_seed(spectr, given):
    said = [spectr("chat", "-n", 8, "-t", 2, "--seed", seed, *given, stdin="what is it\n")[1] for seed in (3, 3, 4)]
    assert said[0] == said[1] != said[2]


def test_demo_shows_a_table_and_writes_both_pictures(spectr, given, tmp_path):
    code, text, _ = spectr("demo", "--out", tmp_path / "out", *given)
    assert code == 0
    for task in ("agnews", "cola", "dbpedia", "hellaswag", "mnli", "mrpc", "qnli", "qqp", "sst2"):
        assert task in text
    assert (tmp_path / "out" / "routing.png").read_bytes().startswith(b"\x89PNG")
    assert "routing.html" in text


def test_library_round_trip(spectr, world, tmp_path):
    library = tmp_path / "library"
    for name in ("blue", "amber"):
        assert spectr("library", "add", name, world / "adapters" / name, "-l", library)[0] == 0
    _, text, _ = spectr("library", "list", "-l", library, "--json")
    assert [entry["name"] for entry in json.loads(text)] == ["amber", "blue"]
    assert "amber" in spectr("library", "list", "-l", library)[1]
    assert json.loads(spectr("library", "show", "blue", "-l", library, "--json")[1])["ranks"] == [4]
    assert "rank 4" in spectr("library", "show", "blue", "-l", library)[1]
    assert "all 2 experts are unchanged since they were added" in spectr("library", "verify", "-l", library)[1]
    assert spectr("library", "remove", "blue", "-l", library)[:2] == (0, "removed blue\n")
    weights = next(library.glob("amber-*/adapter_model.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    code, _, message = spectr("library", "verify", "-l", library)
    assert code == 2
    assert "SHA-256 differs" in message


def test_train_then_use_the_expert(spectr, world, tmp_path):
    rows = save_rows(tmp_path / "rows.jsonl")
    words = ("train", "--data", rows, "--test", rows, "--prompt", "what is the colour of the {thing}")
    words += ("--choices", "green,blue", "--out", tmp_path / "runs" / "colours", "--model", world / "model")
    words += ("--learning-rate", 1e-2, "--batch-size", 4, "--rank", 4, "--examples", 16)
    code, text, _ = spectr(*words)
    assert code == 0
    assert "on 40 test rows; base model:" in text
    code, _, message = spectr(*words)
    assert code == 2
    assert "already holds an expert" in message
    library = tmp_path / "library"
    assert spectr("library", "add", "colours", tmp_path / "runs" / "colours", "-l", library)[0] == 0
    assert "Accuracy" in spectr("library", "show", "colours", "-l", library)[1]


def test_a_path_that_cannot_be_written_is_named(spectr, given, tmp_path):
    (tmp_path / "file").write_text("in the way")
    code, _, message = spectr("route", "what", "--html", tmp_path / "file" / "page.html", *given)
    assert code == 2
    assert f"{tmp_path / 'file'}" in message
    assert "check the path, its permissions and the free space" in message
    assert (tmp_path / "file").read_text() == "in the way"


GENERATE = ("generate", "what")
COLOURS = ("--choices",)
TRAIN = ("--data", "{rows}", "--prompt", "what is the colour of the {{thing}}", *COLOURS, "green,blue")
MISTAKES = {
    "missing library": ((*GENERATE, "-l", "nowhere"), "there is no library folder nowhere"),
    "unknown router": ((*GENERATE, "-l", "{adapters}", "-r", "arow"), "did you mean 'arrow'?"),
    "top-k too large": ((*GENERATE, "-l", "{adapters}", "-k", "7"), "top_k=7, but the library has 3 experts"),
    "unknown expert": ((*GENERATE, "-l", "{adapters}", "-a", "blu"), "did you mean 'blue'?"),
    "oracle without expert": (
        (*GENERATE, "-l", "{adapters}", "-r", "oracle"),
        "router 'oracle' needs the setting expert",
    ),
    "a picture of no kind": (("route", "what", "-l", "{adapters}", "--png", "x.xyz"), "x.xyz does not end in .png"),
    "a page that is a folder": (("route", "what", "-l", "{adapters}", "--html", "{folder}"), "is a folder"),
    "a model folder without a model": ((*GENERATE, "-l", "{adapters}", "-m", "{adapters}"), "has no config.json"),
    "a model of no Hub": ((*GENERATE, "-l", "{adapters}", "-m", "no/such-model"), "the Hub did not return it"),
    "a file for a library": ((*GENERATE, "-l", "{file}"), "is a file"),
    "a file for an adapter": (("library", "add", "x", "{file}", "-l", "new"), "is a file"),
    "training into others' files": (("train", "-o", "{files}", *TRAIN), "holds other files (mine.txt)"),
    "training into a file": (("train", "-o", "{file}", *TRAIN), "is a file"),
    "all rows held out": (("train", "-o", "{out}", *TRAIN, "--validation", "40"), "holds out all 40 rows"),
    "a field that is not there": (
        ("train", "-o", "{out}", "--data", "{rows}", *COLOURS, "green,red", "--prompt", "{{nothing}}"),
        "row 1: task 'out' needs the field 'nothing'",
    ),
    "a rank of zero": (("train", "-o", "{out}", *TRAIN, "--rank", "0"), "out of range: rank=0"),
    "missing model": ((*GENERATE, "-l", "{adapters}", "-m", "/no/model"), "the model '/no/model' could not be loaded"),
    "bad dtype": ((*GENERATE, "-l", "{adapters}", "-m", "{model}", "--dtype", "int3"), "--dtype int3"),
    "empty prompt": (("generate", " ", "-l", "{adapters}"), "the prompt is empty"),
    "an adapter, not a library": ((*GENERATE, "-l", "{adapters}/blue"), "pass its parent folder"),
    "library of nothing": (("library", "list", "-l", "{model}"), "holds no experts"),
    "plain folder verified": (("library", "verify", "-l", "{adapters}"), "plain folder of adapters"),
    "remove from nowhere": (("library", "remove", "x", "-l", "nowhere"), "there is no library folder nowhere"),
    "training without a template": (("train", "-o", "{out}"), "there is no prompt template"),
    "unknown task": (("train", "-o", "{out}", "--task", "agnew"), "did you mean 'agnews'?"),
    "task without data": (
        ("train", "-o", "{out}", "--task", "agnews", "--data-root", "/no"),
        "no data file at /no/agnews",
    ),
    "two kinds of answer": (
        ("train", "-o", "{out}", "--prompt", "{{x}}", "--answer", "a", "--choices", "b,c"),
        "one kind of answer is needed",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_one_clear_message_and_exit_code_2(spectr, world, tmp_path, monkeypatch, mistake):
    words, message = MISTAKES[mistake]
    places = {name: world / name for name in ("adapters", "model")}
    places |= {"out": tmp_path / "out", "rows": save_rows(tmp_path / "rows.jsonl")}
    places |= {"file": tmp_path / "a-file", "files": tmp_path / "files", "folder": tmp_path / "folder.html"}
    places["file"].write_text("mine")
    places["files"].mkdir()
    (places["files"] / "mine.txt").write_text("mine")
    places["folder"].mkdir()
    monkeypatch.chdir(tmp_path)
    code, text, notes = spectr(*(word.format(**places) if "{" in word else word for word in words))
    assert code == 2
    assert text == ""
    assert message in notes
    assert "Traceback" not in notes
    assert not (tmp_path / "out").exists()


BENCHMARK = ("benchmark", "-l", "{adapters}", "-r", "spectr")
REFUSED_BY_THE_BASE = {
    "a prompt beyond its context": ((*BENCHMARK, "--prompt", "9000"), "at most 2048 tokens in all"),
    "no such module": (
        ("train", "-o", "{out}", *TRAIN, "--target-modules", "nope"),
        "expected: all-linear, or some of: down_proj, ",
    ),
    "no chat template": (("chat", "-l", "{adapters}"), "this model has no chat template"),
}


@pytest.mark.parametrize("mistake", REFUSED_BY_THE_BASE)
def test_what_the_base_refuses_is_found_before_its_weights_are_read(spectr, world, tmp_path, monkeypatch, mistake):
    words, message = REFUSED_BY_THE_BASE[mistake]
    base = tmp_path / "base"
    make_model().config.save_pretrained(base)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(base)
    rows = save_rows(tmp_path / "rows.jsonl")
    places = {"adapters": world / "adapters", "out": tmp_path / "out", "rows": rows}
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", None)
    code, text, notes = spectr(*(word.format(**places) for word in words), "-m", base)
    assert (code, text) == (2, "")
    assert message in notes
    assert not (tmp_path / "out").exists()


def test_where_nobody_watches_progress_is_lines(capsys, monkeypatch):
    """In a log file: one at a phase's end, and one now and then in between."""
    from spectr.cli import console

    clock = iter([0.0, 1.0, 16.0, 17.0, 18.0])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    with console.bar() as advance:
        for done in (1, 2, 3, 4):
            advance("reading", done, 4, "")
        advance("writing", 1, 2, "slow")
    assert [line.strip("· ") for line in capsys.readouterr().err.splitlines()] == ["reading: 3 of 4", "reading: 4 of 4"]
