"""PHATGOOSE: gates that are trained after the expert, stored next to it, and used for routing."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import MambaConfig, MambaForCausalLM, T5Config, T5ForConditionalGeneration
from typer.testing import CliRunner

from guided import library_with_gates
from library_on_disk import folders
from models import build, peft_adapter
from spectr import ExpertLibrary, Phatgoose, compose
from spectr.adapters import CARD_DATA, GATES_FILE, Factors, Update, read_adapter, read_gates
from spectr.cli.app import app
from spectr.errors import AdapterError, CompositionError, DataError
from spectr.library import LibraryStore
from spectr.spectral import reference
from spectr.tasks import Task
from spectr.tasks.rows import Source
from spectr.training import AUTHORS_GATES, GateSettings, encode, train_gates
from spectr.training.data import batches
from spectr.training.fit import answer_loss
from spectr.training.gate_training import GatedLinear, checkpoint_of, forget, keep_gates
from spectr.training.training_plan import read_gate_plan, read_plan, run_gate_plan, run_plan
from text_model import make_model, make_tokenizer, save_experts, save_model, save_rows

TASK = Task.of(name="colours", version=1, prompt="what is the colour of the {thing}", choices=("green", "blue"))
EXAMPLES = [TASK.example({"thing": "sky" if i % 2 else "grass", "label": i % 2}) for i in range(16)]
SETTINGS = GateSettings(steps=6, batch_size=4, learning_rate=1e-2, seed=3)


@pytest.fixture
def expert(tmp_path):
    return read_adapter(save_experts(tmp_path / "plain", ("sky",)) / "sky", "sky")


def gates_of(expert, work, settings=SETTINGS, model=None, **more):
    model = model or make_model()
    return train_gates(model, make_tokenizer(), expert, train=EXAMPLES, settings=settings, work=work, **more)


def test_one_step_is_the_gradient_of_the_gated_loss(expert, tmp_path):
    """AdamW's first step is lr * sign(gradient): the signs are those of a loss written down plainly."""
    settings = replace(SETTINGS, steps=1, warmup=0.0, batch_size=16, learning_rate=1e-3)
    gates, _ = gates_of(expert, tmp_path / "w", settings)
    model, tokenizer = make_model(), make_tokenizer()
    vectors = {}
    with expert.open() as read:
        for module, shape in expert.shapes.items():
            vectors[module] = torch.zeros(shape.inputs, requires_grad=True)
            A, B, scale = read(module)

            def add(_, args, out, module=module, delta=scale * B @ A):
                x = args[0]
                return out + torch.sigmoid((x * vectors[module]).sum(-1, keepdim=True)) * (x @ delta.T)

            model.get_submodule(module).register_forward_hook(add)
    data = encode(tokenizer, EXAMPLES, 512)
    [batch] = batches(data, batch_size=16, epochs=1, seed=3, pad=2)
    answer_loss(model, batch, torch.tensor([data.prefix]), torch.device("cpu")).backward()
    for module, gate in gates.items():
        gradient = vectors[module].grad
        clear = gradient.abs() > 1e-5 * gradient.abs().max()  # AdamW's epsilon blurs what is near zero
        torch.testing.assert_close(gate[clear], -1e-3 * gradient.sign()[clear], rtol=2e-2, atol=0)


def test_accumulated_batches_are_one_large_batch(expert, tmp_path):
    """Every answer has as many tokens, so that the mean over batches is the mean over rows."""
    whole, _ = gates_of(expert, tmp_path / "whole", replace(SETTINGS, steps=3, batch_size=16))
    parts, made = gates_of(expert, tmp_path / "parts", replace(SETTINGS, steps=3, batch_size=4, accumulation=4))
    for module, gate in whole.items():
        torch.testing.assert_close(parts[module], gate, rtol=1e-3, atol=1e-5)
    assert made["passes"] == 3.0


def test_the_authors_step_has_1024_rows():
    assert AUTHORS_GATES.passes(1024) == AUTHORS_GATES.steps == 100
    assert GateSettings().passes(800) == 1.0


def test_gates_start_at_one_half(expert):
    layer = torch.nn.Linear(32, 32)
    with expert.open() as read:
        factors = read("model.layers.0.self_attn.q_proj")
    gated, x = GatedLinear(layer, Update(factors), torch.device("cpu"), torch.float32), torch.randn(5, 32)
    expected = layer(x) + 0.5 * factors.scale * (x @ (factors.B @ factors.A).T)
    torch.testing.assert_close(gated(x), expected, rtol=0, atol=1e-5)


def test_a_gate_opens_for_the_whole_update():
    layer, factors = torch.nn.Linear(6, 4), Factors(torch.randn(2, 6), torch.randn(4, 2), 0.5)
    gain, shift, x = torch.randn(4), torch.randn(4), torch.randn(5, 6)
    gated = GatedLinear(layer, Update(factors, gain, shift), torch.device("cpu"), torch.float32)
    update = 0.5 * x @ (factors.B @ factors.A).T + gain * (x @ layer.weight.T) + shift
    torch.testing.assert_close(gated(x), layer(x) + 0.5 * update)


def test_training_lowers_the_loss_and_leaves_model_and_expert_alone(expert, tmp_path):
    model = make_model()
    model.lm_head.requires_grad_(False)
    model.model.layers[1].train()
    modes = [module.training for module in model.modules()]
    before, modules = copy.deepcopy(model.state_dict()), dict(model.named_modules())
    bytes_before = expert.weights.read_bytes()
    losses = []
    settings = replace(SETTINGS, steps=60)
    gates, facts = gates_of(expert, tmp_path / "w", settings, model, progress=lambda *step: losses.append(step[3]))
    assert set(gates) == set(expert.shapes)
    assert float(losses[-1].split()[-1]) < float(losses[0].split()[-1])
    assert facts["settings"]["steps"] == 60
    assert {name: id(module) for name, module in model.named_modules()} == {n: id(m) for n, m in modules.items()}
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert frozen == ["lm_head.weight"]
    assert [module.training for module in model.modules()] == modes
    assert expert.weights.read_bytes() == bytes_before


def test_a_killed_run_ends_with_the_same_gates(expert, tmp_path):
    whole, _ = gates_of(expert, tmp_path / "whole")

    class KilledError(Exception):
        pass

    def kill(phase, done, total, remark):
        if done == 4:
            raise KilledError

    with pytest.raises(KilledError):
        gates_of(expert, tmp_path / "w", progress=kill, checkpoint_seconds=0)
    seen = []
    resumed, _ = gates_of(expert, tmp_path / "w", progress=lambda *step: seen.append(step[1]))
    assert seen == [4, 5, 6]
    assert all(torch.equal(whole[module], resumed[module]) for module in whole)
    with pytest.raises(DataError, match="checkpoint of a run with other settings"):
        gates_of(expert, tmp_path / "w", replace(SETTINGS, seed=4))
    forget(tmp_path / "w")
    assert not checkpoint_of(tmp_path / "w").exists()


def test_gates_of_a_model_with_encoder_and_decoder(tmp_path):
    from peft import LoraConfig, get_peft_model

    def make():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
            return T5ForConditionalGeneration(
                T5Config(vocab_size=40, pad_token_id=2, eos_token_id=2, decoder_start_token_id=2, **sizes)
            ).eval()

    config = LoraConfig(r=2, target_modules=["q", "v", "wo"], init_lora_weights=False)
    get_peft_model(make(), config).save_pretrained(str(tmp_path / "plain" / "sky"))
    library = ExpertLibrary.open(tmp_path / "plain")
    model = make()
    gates, facts = train_gates(
        model, make_tokenizer(), library["sky"], train=EXAMPLES, settings=SETTINGS, work=tmp_path / "w"
    )
    assert any("decoder" in module for module in gates)
    assert all(gate.abs().max() > 0 for gate in gates.values())
    keep_gates(tmp_path / "plain", library["sky"], gates, facts)
    compose(model, library, Phatgoose(top_k=1))
    model(input_ids=torch.tensor([[5, 6, 7]]), decoder_input_ids=torch.tensor([[2, 3]]))


def test_weights_that_a_model_reads_without_a_call_have_no_gates(tmp_path):
    """An update of zero at ``dt_proj``, as training leaves it, has a gate of zero; another one is refused by name."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "state_size": 4, "time_step_rank": 4}
    model = build(MambaForCausalLM, MambaConfig(vocab_size=64, **sizes, pad_token_id=2))
    targets, dt = ["in_proj", "dt_proj"], "backbone.layers.0.mixer.dt_proj"
    folder = peft_adapter(model, tmp_path / "sky", 1, rank=2, targets=targets)
    given = {"train": EXAMPLES, "settings": SETTINGS}
    with pytest.raises(CompositionError, match=f"changes {dt}, whose weights this model uses without calling"):
        train_gates(model, make_tokenizer(), read_adapter(folder, "sky"), work=tmp_path / "w", **given)
    weights = load_file(folder / "adapter_model.safetensors")
    save_file({k: v * (0 if "dt_proj" in k else 1) for k, v in weights.items()}, folder / "adapter_model.safetensors")
    expert = read_adapter(folder, "sky")
    gates, facts = train_gates(model, make_tokenizer(), expert, work=tmp_path / "w", **given)
    assert not gates[dt].any()
    keep_gates(tmp_path, expert, gates, facts)
    compose(model, ExpertLibrary.from_adapters({"sky": folder}), Phatgoose(top_k=1))
    model(input_ids=torch.tensor([[5, 6, 7]]))


def test_gates_survive_a_library_and_another_copy(tmp_path):
    library = library_with_gates(tmp_path)
    gates = read_gates(library["two"])
    store = LibraryStore(tmp_path / "experts")
    assert store.verify() == dict.fromkeys(("one", "three", "two"))
    entry = LibraryStore(tmp_path / "copy").add("two", store.root / store.entry("two").folder)
    assert GATES_FILE in entry.sha256
    again = read_gates(ExpertLibrary.open(tmp_path / "copy")["two"])
    assert all(torch.equal(gates[module], again[module]) for module in gates)
    assert len(folders(store.root)) == 3  # those without gates were swept up


def test_a_routed_layer_scores_by_the_gates(tmp_path):
    library, model = library_with_gates(tmp_path), make_model()
    compose(model, library, Phatgoose())
    name = "model.layers.1.mlp.down_proj"
    layer = model.get_submodule(name)
    x_TI = 3 * torch.randn(7, 48, generator=torch.Generator().manual_seed(5)) + 1
    decision = layer.route(x_TI)
    for t, x in enumerate(x_TI.double()):
        scores = [reference.gate_score(read_gates(library[e])[name].double(), x) for e in library]
        weights = reference.softmax_weights(scores, 2, 1.0)
        torch.testing.assert_close(decision.scores_TE[t].double(), torch.tensor(scores).double(), rtol=0, atol=1e-5)
        torch.testing.assert_close(decision.weights_TE[t].double(), torch.tensor(weights).double(), rtol=0, atol=1e-5)


def test_experts_without_gates_are_named_with_the_command(tmp_path):
    save_experts(tmp_path / "plain", ("one", "two"))
    model = make_model()
    told = r"no gates were trained for: one, two(.|\n)*spectr train gates --library"
    with pytest.raises(CompositionError, match=told):
        compose(model, ExpertLibrary.open(tmp_path / "plain"), Phatgoose(top_k=1))


def test_damaged_gates_are_reported(tmp_path):
    library = library_with_gates(tmp_path, ("one", "two"))
    path = library["one"].weights.parent / GATES_FILE
    tensors = load_file(path)
    first = min(tensors)
    for wrong in (
        {first: tensors[first][:-1]},
        {first: tensors[first] * float("nan")},
        {"other": tensors[first].clone()},
    ):
        save_file({**tensors, **wrong}, path)
        with pytest.raises(AdapterError, match=r"does not fit the adapter at"):
            read_gates(library["one"])
    path.write_bytes(b"nothing")
    with pytest.raises(AdapterError, match="cannot be read as safetensors"):
        compose(make_model(), library, Phatgoose())


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"warmup": 1.0}, {"learning_rate": -1.0}, {"schedule": "odd"}])
def test_settings_out_of_range(wrong):
    with pytest.raises(DataError, match="settings of the gates out of range"):
        GateSettings(**wrong)


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def command(tmp_path):
    """A library, a model and rows; the words of a command that trains gates in them."""
    save_experts(tmp_path / "plain", ("sky", "grass"))
    for name in ("sky", "grass"):
        LibraryStore(tmp_path / "experts").add(name, tmp_path / "plain" / name)
    save_model(tmp_path / "model")
    rows = save_rows(tmp_path / "rows.jsonl")
    prompt = ("--prompt", "what is the colour of the {thing}", "--choices", "green,blue")
    return ("-l", tmp_path / "experts", "-m", tmp_path / "model", "--data", rows, *prompt, "--steps", 2)


def test_the_command_trains_keeps_and_skips(command, tmp_path):
    assert run("train", "gates", "sky", *command).exit_code == 0
    entry = LibraryStore(tmp_path / "experts").entry("sky")
    assert GATES_FILE in entry.sha256
    assert "all of these experts have gates" in run("train", "gates", "sky", *command).output
    assert not list((tmp_path / "experts").glob(".gates-*"))
    assert run("train", "gates", *command).exit_code == 0  # the one that is left
    shown = run("generate", "what", "-l", tmp_path / "experts", "-m", tmp_path / "model", "-r", "phatgoose", "--json")
    assert json.loads(shown.stdout.splitlines()[-1])["router"].startswith("Phatgoose(")


def test_gates_learn_from_the_rows_that_trained_the_expert(tmp_path):
    """Rows 5 to 12 of 20: four are held out for validation, eight train."""
    source, library = numbered(tmp_path / "rows.jsonl", 20), tmp_path / "all"
    plan = read_plan(library / "sky", source, validation=4, settings={"examples": 8, "max_length": 64})
    run_plan(plan, make_model(), make_tokenizer(), base_model="tiny")
    plan = read_gate_plan(library, (), source, settings={"steps": 4})
    _, examples, origin = plan.experts["sky"]
    assert [example.prompt.split()[-1] for example in examples] == [str(i) for i in range(4, 12)]
    assert origin["rows"] == [5, 12]
    assert plan.remarks == ["gates of sky: 4.0 epochs of 8 rows, 5 to 12, which trained it"]
    _, examples, origin = read_gate_plan(library, (), source, limit=3, settings={}).experts["sky"]
    assert (len(examples), origin["rows"]) == (3, [5, 7])
    run_gate_plan(plan, make_model(), make_tokenizer())
    with safe_open(library / "sky" / GATES_FILE, framework="pt") as file:
        facts = json.loads(file.metadata()["facts"])
    assert (facts["data"]["rows"], facts["examples"], facts["passes"]) == ([5, 12], 8, 4.0)
    other = read_gate_plan(library, (), numbered(tmp_path / "other.jsonl", 6), fresh=True, settings={})
    (library / "sky" / CARD_DATA).write_text("[]")  # another program's
    unknown = read_gate_plan(library, (), source, fresh=True, settings={})
    for plan, count in ((other, 6), (unknown, 20)):
        assert len(plan.experts["sky"][1]) == count
        assert "rows" not in plan.experts["sky"][2]
        assert "perhaps not only those that trained it" in plan.remarks[0]


def numbered(path, count):
    """Rows of a file as data of an expert; each has its number in the prompt."""
    path.write_text("\n".join(json.dumps({"thing": str(i), "label": i % 2}) for i in range(count)))
    return Source(prompt="what is the colour of the {thing}", choices="green,blue", train=str(path))


def test_the_command_says_what_is_missing(command, tmp_path):
    for words, expected in (
        (("gates", "sky"), "no library was named for the gates"),
        (("gates", *command), "one task's data cannot be for 2 experts"),
        (("gates", "sky", "-l", tmp_path / "experts"), "no shipped task has the name of the expert 'sky'"),
        (("--task", "sst2"), "no folder was named for the expert"),
    ):
        assert expected in str(run("train", *words).exception), words
