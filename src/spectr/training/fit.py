"""The training loop and its checkpoints, each one safetensors file that is replaced atomically.

It is our own short loop instead of transformers' Trainer for three reasons. Tokens that all prompts share run once per
batch, not once per example. Logits are computed for the answer only. Every step draws its random numbers from
(seed, step), so that an interrupted run ends with the same weights.
"""

from __future__ import annotations

import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import get_scheduler

from spectr.errors import DataError, first_line
from spectr.training.data import Batch, Encoded, batches, count_steps
from spectr.training.training_settings import OptimizerSettings

_MOMENTS = ("exp_avg", "exp_avg_sq")
Progress = Callable[[str, int, int, str], None]


def fit(
    model: Any,
    data: Encoded,
    settings: OptimizerSettings,
    total: int,
    facts: dict[str, Any],
    checkpoint: Path,
    checkpoint_seconds: float,
    progress: Progress,
    validate: Callable[[str], float] | None = None,
    *,
    accumulation: int = 1,
) -> dict[str, Any]:
    """Train the model's trainable parameters for ``total`` steps, starting at the step in ``facts``.

    Returns the facts at the end. A step takes ``accumulation`` batches and averages their gradients. Epochs are counted
    for one batch a step.

    With ``validate``, which is called after every epoch, the parameters of the best epoch are kept (the first of equal
    ones). Ctrl-C ends the step, saves a checkpoint and raises ``KeyboardInterrupt``.
    """
    parameters = trainable(model)
    per_epoch = count_steps(data, batch_size=settings.batch_size, epochs=1)
    optimizer = torch.optim.AdamW(
        list(parameters.values()), lr=settings.learning_rate, weight_decay=settings.weight_decay
    )
    done, before = facts["step"], facts["seconds"]
    best = load_checkpoint(checkpoint, parameters, optimizer, done) if done else {}
    scheduler = _scheduler_at(done, optimizer, settings, total)
    model.train()
    began = saved = time.monotonic()
    stream = _stream(model.config, data, settings, -(-total * accumulation // per_epoch))
    batches_left = islice(stream, done * accumulation, total * accumulation)
    with deferred_interrupt() as interrupted:
        for step in range(done, total):
            batch = list(islice(batches_left, accumulation))
            loss = _step(model, batch, data.prefix, optimizer, parameters, settings, step)
            scheduler.step()
            facts = {**facts, "step": step + 1, "loss": loss, "seconds": before + time.monotonic() - began}
            progress("training", step + 1, total, f"loss {loss:.3f}")
            epoch, within = divmod(step + 1, per_epoch)
            if validate and not within:
                values = facts["validation"]
                model.eval()
                value = validate(f"validation after epoch {epoch}")
                model.train()
                if value > max(values, default=-1.0):
                    best = {name: parameter.detach().clone() for name, parameter in parameters.items()}
                facts = {**facts, "validation": [*values, value]}
            if time.monotonic() - saved > checkpoint_seconds or step + 1 == total or interrupted():
                save_checkpoint(checkpoint, parameters, optimizer, best, facts)
                saved = time.monotonic()
            if interrupted():
                raise KeyboardInterrupt
    with torch.no_grad():
        for name, tensor in best.items():
            parameters[name].copy_(tensor)
    return facts


def fresh_facts(fingerprint: str, **more: Any) -> dict[str, Any]:
    """The facts of a new run."""
    return {"fingerprint": fingerprint, "step": 0, "loss": float("nan"), "seconds": 0.0, "validation": [], **more}


def _scheduler_at(step: int, optimizer: torch.optim.Optimizer, settings: OptimizerSettings, total: int) -> Any:
    """The learning rate's schedule, at the run's step."""
    scheduler = get_scheduler(settings.schedule, optimizer, round(settings.warmup * total), total)
    for _ in range(step):
        optimizer._opt_called = True  # pyright: ignore[reportAttributeAccessIssue]  # these steps were made earlier
        scheduler.step()
    return scheduler


def _stream(config: Any, data: Encoded, settings: OptimizerSettings, epochs: int) -> Iterator[Batch]:
    return batches(
        data,
        batch_size=settings.batch_size,
        epochs=epochs,
        seed=settings.seed,
        pad=_pad(config),
        two_sided=bool(getattr(config, "is_encoder_decoder", False)),
    )


def _pad(config: Any) -> int:
    """Any id, since nothing reads padding; of a model with several parts the text's configuration names one."""
    pad = getattr(config.get_text_config(), "pad_token_id", None)
    return pad if isinstance(pad, int) and pad >= 0 else 0


def _step(
    model: Any,
    some: Sequence[Batch],
    prefix: list[int],
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    settings: OptimizerSettings,
    step: int,
) -> float:
    device, mean = next(iter(parameters.values())).device, 0.0
    optimizer.zero_grad(set_to_none=True)
    for number, batch in enumerate(some):
        with torch.random.fork_rng():
            torch.manual_seed(settings.seed * 1_000_003 + step * len(some) + number)
            loss = answer_loss(model, batch, torch.tensor([prefix], dtype=torch.long, device=device), device)
        if not loss.requires_grad:
            raise DataError(
                "the loss does not depend on any trained module",
                expected="modules that text goes through",
                do="train other modules: --target-modules all-linear",
            )
        (loss / len(some)).backward()
        mean += loss.item() / len(some)
    norm = torch.nn.utils.clip_grad_norm_(parameters.values(), settings.max_grad_norm).item()
    if not (math.isfinite(mean) and math.isfinite(norm)):
        raise DataError(
            f"the training diverged: in step {step + 1} the loss is {mean:.3g}, and its gradient's norm {norm:.3g}",
            expected="finite numbers",
            do="use a lower --learning-rate and another --out; or --dtype float32, if the model was in half precision",
        )
    optimizer.step()
    return mean


def answer_loss(model: Any, batch: Batch, prefix_1S: Tensor, device: torch.device) -> Tensor:
    """Mean cross-entropy of the answers' tokens, in nats; the prefix runs once for the whole batch."""
    if model.config.is_encoder_decoder:
        given = {key: getattr(batch, key).to(device) for key in ("input_ids", "attention_mask", "labels")}
        return model(**given).loss
    more: dict[str, Any] = {}
    if prefix_1S.shape[1]:
        cache = model(input_ids=prefix_1S, use_cache=True, logits_to_keep=1).past_key_values
        cache.batch_repeat_interleave(len(batch.input_ids))
        more["past_key_values"] = cache
    # Positions as a tensor: the slice that an int makes is not contiguous, so that the output layer reads its weights
    # once for each example.
    width, kept = batch.input_ids.shape[1], batch.labels.shape[1]
    logits_BAV = model(
        input_ids=batch.input_ids.to(device),
        attention_mask=batch.attention_mask.to(device),
        position_ids=batch.position_ids.to(device),
        logits_to_keep=torch.arange(width - kept, width, device=device),
        use_cache=bool(more),
        **more,
    ).logits[:, -kept:]  # some models answer for all tokens
    return nn.functional.cross_entropy(logits_BAV.flatten(0, 1).float(), batch.labels.to(device).flatten())


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, in alphabetical order."""
    return {name: p for name, p in sorted(model.named_parameters()) if p.requires_grad}


@contextmanager
def deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Yield a function that returns whether Ctrl-C was pressed; a second Ctrl-C interrupts at once.

    Outside of the main thread, where Python allows no handlers, nothing is deferred.
    """
    pressed = False

    def note(_number: int, _frame: FrameType | None) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)


def save_checkpoint(
    path: Path,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    best: Mapping[str, Tensor],
    facts: dict[str, Any],
) -> None:
    """Write parameters, AdamW's moments and the best epoch's weights; ``facts`` (JSON) goes into the header."""
    tensors = {f"parameter/{name}": parameter.detach() for name, parameter in parameters.items()}
    tensors |= {f"best/{name}": tensor for name, tensor in best.items()}
    for name, parameter in parameters.items():  # without a state where it never had a gradient
        tensors |= {f"{key}/{name}": value for key, value in optimizer.state.get(parameter, {}).items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".partial")
    save_file({k: v.contiguous().cpu() for k, v in tensors.items()}, scratch, metadata={"facts": json.dumps(facts)})
    os.replace(scratch, path)


def read_facts(path: Path, fingerprint: str | None = None) -> dict[str, Any] | None:
    """The facts of a checkpoint; ``None`` if there is none. Without ``fingerprint``, of any run.

    Raises:
        DataError: The checkpoint belongs to a run with other settings, data or base model, or is damaged.
    """
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads(file.metadata()["facts"])
    except Exception as error:  # a damaged file may raise anything
        raise DataError(
            f"the checkpoint {path} cannot be read: {first_line(error)}", do="delete it, to begin again"
        ) from error
    if fingerprint is not None and facts["fingerprint"] != fingerprint:
        raise DataError(
            f"{path} is the checkpoint of a run with other settings, data or base model",
            expected="the same settings, to resume that run",
            do="use the same settings, choose another --out, or delete the checkpoint",
        )
    return facts


def load_checkpoint(
    path: Path, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, step: int
) -> dict[str, Tensor]:
    """Put a checkpoint's tensors into the parameters and the optimiser; returns the best epoch's weights, if any.

    A parameter has its own count of steps, those with a gradient; in files of earlier versions all had ``step``.
    """
    with safe_open(path, framework="pt") as file, torch.no_grad():
        names = set(file.keys())
        for name, parameter in parameters.items():
            parameter.copy_(file.get_tensor(f"parameter/{name}"))
            if f"{_MOMENTS[0]}/{name}" in names:
                moments = {key: file.get_tensor(f"{key}/{name}").to(parameter.device) for key in _MOMENTS}
                own = f"step/{name}"
                count = file.get_tensor(own) if own in names else torch.tensor(float(step), dtype=torch.float32)
                optimizer.state[parameter] = {"step": count, **moments}
        best = sorted(name for name in names if name.startswith("best/"))
        return {name.removeprefix("best/"): file.get_tensor(name) for name in best}
