"""Training: what the loss is, that a killed run ends the same, and what is left on disk."""

import json
import re
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from spectr.adapters import read_adapter
from spectr.errors import DataError
from spectr.tasks import Example, Task
from spectr.training import TrainingSettings, batches, checkpoint_step, encode, train_expert
from spectr.training.adapter import with_adapter
from spectr.training.fit import answer_loss
from text_model import make_model, make_tokenizer

TASK = Task.of(name="colours", version=1, prompt="what is the colour of the {thing}", choices=("green", "blue"))
ROWS = [{"thing": "sky" if i % 2 else "grass", "label": i % 2} for i in range(40)]
EXAMPLES = [TASK.example(row) for row in ROWS]
SETTINGS = TrainingSettings(rank=4, learning_rate=1e-2, batch_size=4, epochs=2, seed=3)


def train(out, settings=SETTINGS, model=None, **more):
    arguments = {"name": "colours", "base_model": "tiny", "train": EXAMPLES, "test": EXAMPLES[:10], **more}
    return train_expert(model or make_model(), make_tokenizer(), settings=settings, out=out, **arguments)


def weights(folder):
    return load_file(folder / "adapter_model.safetensors")


def test_an_expert_learns_and_its_card_tells_the_truth(tmp_path):
    report = train(tmp_path / "e")
    assert report.accuracy_after == 1.0 > report.accuracy_before
    assert report.steps == 20
    card = json.loads((tmp_path / "e" / "expert.json").read_text())
    assert card["accuracy_after"] == 1.0
    assert card["settings"]["seed"] == 3
    assert card["majority"] == 0.5
    text = (tmp_path / "e" / "README.md").read_text()
    assert "100.0% on 10 test examples" in text
    assert "the majority class 50.0%" in text
    assert sorted(p.name for p in (tmp_path / "e").iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "expert.json",
    ]


def test_the_accuracy_on_the_card_is_that_of_the_saved_weights(tmp_path):
    from spectr.evaluation import accuracy, choice_logprobs, predict

    report = train(tmp_path / "e", replace(SETTINGS, epochs=1, examples=12, learning_rate=3e-3))
    loaded = PeftModel.from_pretrained(make_model(), str(tmp_path / "e")).eval()
    scores = choice_logprobs(loaded, make_tokenizer(), EXAMPLES[:10])
    assert accuracy(predict(scores), EXAMPLES[:10]) == report.accuracy_after
    assert read_adapter(tmp_path / "e", "e").base_model == "tiny"


@pytest.mark.parametrize("raises", [False, True])
def test_the_model_is_given_back_as_it_was(tmp_path, raises):
    def interrupted(phase, *_):
        if raises and phase == "training":
            raise RuntimeError("no room")

    model, ids = make_model(), torch.tensor([[1, 5, 9]])
    model.model.layers[1].train()
    model.lm_head.requires_grad_(False)
    model.activation_checkpointing_enable()
    before, names, attributes = model(ids).logits, list(model.state_dict()), state(model)
    with pytest.raises(RuntimeError) if raises else nullcontext():
        train(tmp_path / "e", model=model, progress=interrupted)
    assert list(model.state_dict()) == names
    assert state(model) == attributes
    assert torch.equal(model(ids).logits, before)


def test_checkpointed_activations_change_no_weights(tmp_path):
    model = make_model()
    model.activation_checkpointing_enable()
    settings = replace(SETTINGS, dropout=0.0, examples=8, epochs=1)  # dropout would draw other numbers
    for name, each in (("one", make_model()), ("other", model)):
        train(tmp_path / name, settings, each)
    one, other = (weights(tmp_path / name) for name in ("one", "other"))
    for key, tensor in one.items():
        assert (tensor - other[key]).float().norm() < 0.02 * tensor.float().norm(), key


def state(model):
    """Attributes, modes, hooks and modules of each module, and which tensors have gradients."""
    own = {
        name: {key: dict(value) if isinstance(value, dict) else value for key, value in vars(module).items()}
        for name, module in model.named_modules()
    }
    return own, {name: parameter.requires_grad for name, parameter in model.named_parameters()}


def test_with_validation_the_best_epochs_weights_are_kept(tmp_path, monkeypatch):
    """The first epoch is declared the best of three: its weights are those of a run of one epoch."""
    import spectr.training.training_run

    values = iter([0.5, 0.9, 0.7, 0.9, 0.5])  # base, three epochs, the expert on the test data
    monkeypatch.setattr(spectr.training.training_run, "accuracy", lambda *_: next(values))
    report = train(tmp_path / "kept", replace(SETTINGS, epochs=3), validation=EXAMPLES[:4])
    monkeypatch.undo()
    assert report.validation_accuracy == [0.9, 0.7, 0.9]
    train(tmp_path / "one", replace(SETTINGS, epochs=1), test=())
    train(tmp_path / "three", replace(SETTINGS, epochs=3), test=())
    kept, one, three = (weights(tmp_path / name) for name in ("kept", "one", "three"))
    assert all(torch.equal(kept[key], one[key]) for key in kept)
    assert not all(torch.equal(kept[key], three[key]) for key in kept)
    card = (tmp_path / "kept" / "README.md").read_text()
    assert "On 4 rows held out of the training data: 90.0%, 70.0%, 90.0% after each epoch" in card
    assert "the weights are those of epoch 1." in card


def test_validation_measures_the_held_out_rows(tmp_path):
    backwards = [replace(example, label=1 - example.label) for example in EXAMPLES[:8]]
    report = train(tmp_path / "e", validation=backwards)
    assert report.accuracy_after == 1.0
    assert report.validation_accuracy[-1] == 0.0


def test_validation_needs_choices(tmp_path):
    with pytest.raises(DataError, match="no choices"):
        train(tmp_path / "e", validation=[Example(prompt="what", answer="no")])
    assert not (tmp_path / "e").exists()


@pytest.mark.parametrize("killed_at", [1, 7, 19, 20])
def test_a_killed_run_ends_with_the_same_weights(tmp_path, monkeypatch, killed_at):
    settings = replace(SETTINGS, dropout=0.2, schedule="linear", warmup=0.1)
    train(tmp_path / "whole", settings, validation=EXAMPLES[:4])

    def dies(phase, done, total, remark):
        if phase == "training" and done == killed_at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", settings, validation=EXAMPLES[:4], progress=dies, checkpoint_seconds=0)
    assert not (tmp_path / "cut" / "adapter_config.json").exists()
    steps = []

    def seen(phase, done, *_):
        steps.append((phase, done))

    report = train(tmp_path / "cut", settings, validation=EXAMPLES[:4], progress=seen)
    assert len(report.validation_accuracy) == 2
    assert report.steps == 20
    assert ("training", 1) not in steps or killed_at == 1
    for key, tensor in weights(tmp_path / "whole").items():
        assert torch.equal(weights(tmp_path / "cut")[key], tensor), key


def test_another_seed_gives_another_expert_and_the_same_seed_the_same(tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        train(tmp_path / name, replace(SETTINGS, seed=seed, epochs=1))
    a, b, c = (weights(tmp_path / name) for name in "abc")
    assert all(torch.equal(a[key], b[key]) for key in a)
    key = next(iter(a))
    assert (a[key] - c[key]).float().norm() > 0.1 * a[key].float().norm()
    targets = json.loads((tmp_path / "a" / "adapter_config.json").read_text())["target_modules"]
    assert targets == sorted(targets)  # a set's order differs from process to process


def test_the_loss_is_the_mean_cross_entropy_of_the_answers_tokens():
    """Against one unpadded forward pass an example, without a shared prefix."""
    tokenizer = make_tokenizer()
    examples = [*EXAMPLES[:2], Example(prompt="what is it", answer="a good film")]
    data = encode(tokenizer, examples, 512)
    assert len(data.prefix) > 0
    model = with_adapter(make_model(), replace(SETTINGS, dropout=0.0)).train()
    [batch] = batches(data, batch_size=3, epochs=1, seed=0, pad=2)
    loss = answer_loss(model, batch, torch.tensor([data.prefix]), torch.device("cpu"))
    total, count = 0.0, 0
    for prompt, answer in zip(data.prompts, data.answers, strict=True):
        logits = model(torch.tensor([data.prefix + prompt + answer])).logits[0]
        begin = len(data.prefix) + len(prompt) - 1
        total += torch.nn.functional.cross_entropy(
            logits[begin : begin + len(answer)], torch.tensor(answer), reduction="sum"
        )
        count += len(answer)
    torch.testing.assert_close(loss, total / count)


def test_every_epoch_sees_every_example_once():
    data = encode(make_tokenizer(), EXAMPLES, 512)
    for epochs in (1, 2):
        seen = sum(len(batch.input_ids) for batch in batches(data, batch_size=7, epochs=epochs, seed=1, pad=2))
        assert seen == epochs * len(EXAMPLES)


def test_a_long_prompt_loses_its_middle_and_is_counted():
    long = Example(prompt=" ".join(["red"] * 50), answer="no")
    data = encode(make_tokenizer(), [long, EXAMPLES[0]], 16)
    assert data.shortened == 1
    assert len(data.prefix) + len(data.prompts[0]) + len(data.answers[0]) == 16


def test_a_long_answer_loses_its_end_and_is_counted(tmp_path):
    long = Example(prompt="what is the colour of the sky", answer=" ".join(["green"] * 50))
    tokenizer = make_tokenizer()
    data = encode(tokenizer, [long, EXAMPLES[0]], 16)
    assert (data.cut, len(data.prefix) + len(data.prompts[0]) + len(data.answers[0])) == (1, 16)
    assert data.answers[0] == [tokenizer("green", add_special_tokens=False)["input_ids"][0]] * 14
    report = train(tmp_path / "e", replace(SETTINGS, max_length=16, epochs=1), train=[long, *EXAMPLES[:3]], test=())
    assert report.shortened.startswith("1 prompts lose their middle, 1 answers lose their end: they are longer than")
    assert "| shortened answers | 1 |" in (tmp_path / "e" / "README.md").read_text()


def test_prompts_without_tokens_are_told_by_number():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="example 2: the prompt '' has no tokens"):
        encode(tokenizer, [EXAMPLES[0], Example(prompt="", answer="no")], 16)


def test_examples_end_where_the_models_context_ends(tmp_path):
    """GPT-2 has no embedding for a position beyond its context."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_positions": 24, "n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": len(make_tokenizer())}
    long = [Example(prompt=" ".join(["red"] * 50), answer="no"), Example(prompt="what", answer=" ".join(["no"] * 50))]
    report = train(tmp_path / "e", model=GPT2LMHeadModel(GPT2Config(**sizes)), train=long, test=())
    assert (report.shortened_prompts, report.shortened_answers, report.steps) == (2, 1, 2)


def test_a_run_that_diverges_is_reported_and_writes_no_expert(tmp_path):
    with pytest.raises(DataError, match=r"the training diverged: in step \d+ the loss is"):
        train(tmp_path / "e", replace(SETTINGS, learning_rate=1e30))
    assert not (tmp_path / "e" / "adapter_config.json").exists()


def test_a_finished_expert_is_not_overwritten(tmp_path):
    train(tmp_path / "e", replace(SETTINGS, epochs=1, examples=4))
    before = (tmp_path / "e" / "adapter_model.safetensors").read_bytes()
    with pytest.raises(DataError, match=r"already holds an expert\n.*choose another --out"):
        train(tmp_path / "e")
    assert (tmp_path / "e" / "adapter_model.safetensors").read_bytes() == before


def test_the_checkpoint_of_another_run_is_refused(tmp_path):
    def dies(phase, done, total, remark):
        if phase == "training":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "e", progress=lambda *a: dies(*a) if a[1] == 2 else None, checkpoint_seconds=0)
    others = [{"settings": replace(SETTINGS, seed=9)}, {"model": make_model().to(torch.bfloat16)}]
    for other in [*others, {"validation": EXAMPLES[:4]}]:
        with pytest.raises(DataError, match="other settings, data or base model"):
            train(tmp_path / "e", **other)


@pytest.mark.parametrize(
    "wrong", [{"rank": 0}, {"dropout": 1.0}, {"learning_rate": -1}, {"examples": 0}, {"schedule": "steps"}]
)
def test_settings_out_of_range_are_named(wrong):
    [name] = wrong
    with pytest.raises(DataError, match=f"out of range: {name}="):
        TrainingSettings(**wrong)


def test_no_examples_is_an_error(tmp_path):
    with pytest.raises(DataError, match="no training examples"):
        train(tmp_path / "e", train=[])


def test_ctrl_c_saves_and_the_run_goes_on(tmp_path):
    """The signal itself, as a terminal sends it, with no checkpoint due for an hour."""
    import signal

    train(tmp_path / "whole")

    def presses(phase, done, total, remark):
        if phase == "training" and done == 7:
            signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", progress=presses, checkpoint_seconds=3600)
    assert signal.getsignal(signal.SIGINT) is before
    assert checkpoint_step(tmp_path / "cut") == 7
    train(tmp_path / "cut")
    for key, tensor in weights(tmp_path / "whole").items():
        assert torch.equal(weights(tmp_path / "cut")[key], tensor), key


def test_files_of_others_are_left_alone(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(DataError, match=r"holds other files \(README.md\)"):
        train(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
    assert (tmp_path / "README.md").read_text() == "mine"


@pytest.mark.parametrize("targets", ["nope", "(q_proj"])
def test_modules_that_are_not_there_are_named_and_nothing_is_made(tmp_path, targets):
    with pytest.raises(DataError, match=rf"target_modules='{re.escape(targets)}'(.|\n)*down_proj"):
        train(tmp_path / "e", replace(SETTINGS, target_modules=targets))
    assert not (tmp_path / "e").exists()


def test_free_text_is_measured_by_its_metric(tmp_path):
    words = ("green", "blue")
    task = Task.of(name="colours", version=1, prompt="what is the colour of the {thing}", answer="{colour}")
    examples = [task.example({"thing": row["thing"], "colour": words[row["label"]]}) for row in ROWS]
    more = {"metric": "exact_match", "max_new_tokens": 3}
    report = train(tmp_path / "e", replace(SETTINGS, epochs=4), train=examples, test=examples[:4], **more)
    assert report.metric == "exact_match"
    assert report.accuracy_before == 0.0
    assert report.accuracy_after == 1.0
    text = (tmp_path / "e" / "README.md").read_text()
    assert "exact_match 100.0% on 4 test examples; the base model has 0.0%." in text


def test_an_unknown_metric_is_reported_before_anything_is_trained(tmp_path):
    task = Task.of(name="colours", version=1, prompt="{thing}", answer="{thing}")
    examples = [task.example(row) for row in ROWS]
    with pytest.raises(DataError, match="metric 'blue' does not measure free text"):
        train(tmp_path / "e", train=examples, test=examples[:4], metric="blue")
    assert not (tmp_path / "e").exists()
