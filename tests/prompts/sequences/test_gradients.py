"""Gradients are those of the experts that the rows have, with checkpointing too."""

from __future__ import annotations

import threading

import pytest
import torch
import transformers

import spectr
from models import close, peft_library, tokens
from picked_experts import with_picked_experts
from trained_modules import ROWS


def gradients_of(model, ids):
    model.train()
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    model.eval()
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


def test_gradient_checkpointing(gradients, world, shared):
    (a, one), (b, two) = shared[2]
    want = [gradients_of(world.oracle(name), ids) for ids, name in ((a, one), (b, two))]
    for reentrant in (None, True, False):
        model, routed = world.routed(spectr.Calibrated())
        if reentrant is not None:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        got = gradients_of(model, torch.cat([a, b]))
        assert got.keys() == want[0].keys()
        for name in got:
            close(got[name], (want[0][name] + want[1][name]) / 2, 1e-4)
        routed.allow([two])  # with checkpointing on
        got = gradients_of(model, b)
        for name in got:
            close(got[name], want[1][name], 1e-4)
    model.train()
    model.zero_grad()
    loss = model(input_ids=b, labels=b).loss
    backward = threading.Thread(target=loss.backward)
    backward.start()
    backward.join()
    for name, value in model.named_parameters():
        if value.grad is not None:
            close(value.grad, want[1][name], 1e-4)


@pytest.mark.parametrize(
    "router", [spectr.Calibrated(), spectr.Calibrated(top_k=2), spectr.Calibrated(level="prior")], ids=repr
)
def test_gradients_after_inference_mode(gradients, world, shared, router):
    both = torch.cat([ids for ids, _ in shared[2]])
    want = gradients_of(world.routed(router)[0], both)
    model, _ = world.routed(router)
    with torch.inference_mode():  # decides alike, and what is kept of that is used again
        model(input_ids=both)
        model.generate(both, max_new_tokens=2)
    got = gradients_of(model, both)
    assert got.keys() == want.keys()
    for name in got:
        close(got[name], want[name], 1e-5)


def test_checkpoints_of_moe_experts_that_pick_tokens_of_several_rows(gradients, tmp_path):
    """What is computed again knows the rows of tokens that a gate picked."""
    model, oracles = with_picked_experts(), []
    library = peft_library(model, tmp_path, {"ants": 4, "bees": 4}, targets=r".*experts\.\d\.[02]|.*q_proj")
    for name in library.names:
        oracles.append(with_picked_experts())
        spectr.compose(oracles[-1], library, spectr.Oracle(expert=name))
    ids = tokens(2, 6, 3)
    ids[:, 0] = torch.tensor([4, 5])  # ROWS gives each its expert by the first token
    want = [gradients_of(oracle, ids[[row]]) for row, oracle in enumerate(oracles)]
    spectr.compose(model, library, ROWS)
    for reentrant in (True, False):
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        got = gradients_of(model, ids)
        assert got.keys() == want[0].keys()
        for name in got:
            close(got[name], (want[0][name] + want[1][name]) / 2, 1e-4)


def test_trainer(gradients, world, shared, tmp_path):
    model, _ = world.routed(spectr.Calibrated())
    rows = [{"input_ids": ids[0], "labels": ids[0]} for ids, _ in shared[2]]
    settings = transformers.TrainingArguments(
        **{"output_dir": tmp_path, "max_steps": 1, "per_device_train_batch_size": 2, "learning_rate": 0.0},
        **{"report_to": [], "activation_checkpointing": True, "use_cpu": True, "disable_tqdm": True},
        **{"save_strategy": "no", "logging_strategy": "no", "dataloader_pin_memory": False},
    )
    loss = transformers.Trainer(model=model, args=settings, train_dataset=rows).train().training_loss
    alone = [world.oracle(name)(input_ids=ids, labels=ids).loss.item() for ids, name in shared[2]]
    assert loss == pytest.approx(sum(alone) / 2, rel=1e-5)
