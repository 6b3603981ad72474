"""One training run: the loop, its evaluation before and after, and what it leaves on disk.

The loop is our own and short, rather than transformers' Trainer, for three things that the Trainer does not do: the
tokens that all prompts share are run once a batch and not once an example, logits are computed for the answer only,
and every step draws its randomness from (seed, step), so that a run killed anywhere ends with the same weights.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, get_scheduler

from spectr.errors import DataError, MissingExtraError
from spectr.evaluation import accuracy, choice_logprobs, predict
from spectr.tasks import Example
from spectr.training.checkpoint import load_checkpoint, read_facts, save_checkpoint
from spectr.training.data import Batch, Encoded, batches, count_steps, encode
from spectr.training.publish import publish
from spectr.training.settings import TrainingSettings

try:
    from peft import LoraConfig, PeftModel, get_peft_model
except ImportError as error:
    raise MissingExtraError("training", "train") from error

Progress = Callable[[str, int, int, str], None]
CHECKPOINT = "checkpoint.safetensors"


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a run came to; also the data of the expert's card.

    Attributes:
        accuracy_before: The base model's, on the test examples, from 0 to 1; ``None`` without choices or test data.
        accuracy_after: The expert's, measured on the weights as saved.
        majority: Share of the most frequent label, where labels mean the same in every row.
    """

    name: str
    base_model: str
    settings: TrainingSettings
    data: dict[str, Any]
    train_examples: int
    test_examples: int
    steps: int
    shortened_prompts: int
    last_loss: float
    accuracy_before: float | None
    accuracy_after: float | None
    majority: float | None
    seconds: float


def train_expert(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    name: str,
    base_model: str,
    train: Sequence[Example],
    test: Sequence[Example] = (),
    settings: TrainingSettings,
    out: str | Path,
    data: dict[str, Any] | None = None,
    length_normalised: bool = False,
    note: str = "",
    checkpoint_seconds: float = 60.0,
    progress: Progress = lambda *_: None,
) -> Report:
    """Train a LoRA expert and write it to ``out`` as PEFT does, with a card; goes on where a killed run stopped.

    Args:
        model: The base model; its weights are left as they are, and the adapter is taken off again.
        tokenizer: Its tokenizer.
        name: The expert's name.
        base_model: What the adapter's configuration names as its base.
        train: Training examples.
        test: Examples to measure accuracy on, before and after; needs choices.
        settings: See :class:`TrainingSettings`.
        out: Folder to write, which must not hold an expert yet.
        data: Origin of the examples (paths, hashes), for the card and to tell one run from another.
        length_normalised: How choices are scored.
        note: A remark for the card.
        checkpoint_seconds: Time between checkpoints.
        progress: Is told (phase, done, total, remark).

    Returns:
        What the card says.

    Raises:
        DataError: ``out`` holds an expert or the checkpoint of another run, or there is nothing to train on.
    """
    out = Path(out)
    if (out / "adapter_config.json").exists():
        raise DataError(f"{out} already holds an expert", do="choose another --out, or delete that folder")
    if not train:
        raise DataError("there are no training examples", do="check the data file and the limit on examples")
    train = train[: settings.examples]
    encoded = encode(tokenizer, train, settings.max_length)
    fingerprint = _fingerprint(asdict(settings), data, base_model, encoded)
    out.mkdir(parents=True, exist_ok=True)
    facts = read_facts(out / CHECKPOINT, fingerprint)

    scored = bool(test) and bool(test[0].choices)
    measure = _meter(model, tokenizer, test, length_normalised, progress) if scored else None
    if facts is None:
        before = measure("base model on the test data") if measure else None
        facts = {
            "fingerprint": fingerprint,
            "step": 0,
            "before": before,
            "seconds": 0.0,
            "loss": float("nan"),
        }
    peft_model = _with_adapter(model, settings)
    try:
        facts = _fit(peft_model, encoded, settings, facts, out / CHECKPOINT, checkpoint_seconds, progress)
        _round_to_bfloat16(_trainable(peft_model))
        peft_model.eval()
        after = measure("expert on the test data") if measure else None
        report = Report(
            name=name,
            base_model=base_model,
            settings=settings,
            data=data or {},
            train_examples=len(train),
            test_examples=len(test),
            steps=facts["step"],
            shortened_prompts=encoded.shortened,
            last_loss=facts["loss"],
            accuracy_before=facts["before"],
            accuracy_after=after,
            majority=_majority(test),
            seconds=round(facts["seconds"], 1),
        )
        publish(peft_model, out, report, note)
    finally:
        peft_model.unload()
    (out / CHECKPOINT).unlink(missing_ok=True)
    return report


def _fit(
    model: PeftModel,
    data: Encoded,
    settings: TrainingSettings,
    facts: dict[str, Any],
    checkpoint: Path,
    checkpoint_seconds: float,
    progress: Progress,
) -> dict[str, Any]:
    parameters = _trainable(model)
    total = count_steps(data, batch_size=settings.batch_size, epochs=settings.epochs)
    optimizer = torch.optim.AdamW(
        list(parameters.values()), lr=settings.learning_rate, weight_decay=settings.weight_decay
    )
    done, loss, before = facts["step"], facts["loss"], facts["seconds"]
    if done:
        load_checkpoint(checkpoint, parameters, optimizer, done)
    scheduler = get_scheduler(settings.schedule, optimizer, round(settings.warmup * total), total)
    for _ in range(done):
        optimizer._opt_called = True  # pyright: ignore[reportAttributeAccessIssue]  # these steps were made earlier
        scheduler.step()
    model.train()
    began = saved = time.monotonic()
    pad = model.config.pad_token_id if model.config.pad_token_id is not None else 0
    stream = batches(data, batch_size=settings.batch_size, epochs=settings.epochs, seed=settings.seed, pad=pad)
    for step, batch in enumerate(stream):
        if step < done:
            continue
        loss = _step(model, batch, data.prefix, optimizer, parameters, settings, step)
        scheduler.step()
        facts = {**facts, "step": step + 1, "loss": loss, "seconds": before + time.monotonic() - began}
        progress("training", step + 1, total, f"loss {loss:.3f}")
        if time.monotonic() - saved > checkpoint_seconds or step + 1 == total:
            save_checkpoint(checkpoint, parameters, optimizer, facts)
            saved = time.monotonic()
    return facts


def _step(
    model: PeftModel,
    batch: Batch,
    prefix: list[int],
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    settings: TrainingSettings,
    step: int,
) -> float:
    device = next(iter(parameters.values())).device
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed * 1_000_003 + step)
        loss = _answer_loss(model, batch, torch.tensor([prefix], dtype=torch.long, device=device), device)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters.values(), settings.max_grad_norm)
    optimizer.step()
    return loss.item()


def _answer_loss(model: PeftModel, batch: Batch, prefix_1S: Tensor, device: torch.device) -> Tensor:
    """Mean cross-entropy of the answers' tokens, in nats; the prefix is run once, for all of the batch."""
    more: dict[str, Any] = {}
    if prefix_1S.shape[1]:
        cache = model(input_ids=prefix_1S, use_cache=True, logits_to_keep=1).past_key_values
        cache.batch_repeat_interleave(len(batch.input_ids))
        more["past_key_values"] = cache
    # Positions as a tensor: the slice that an int makes is not contiguous, and the output layer is then 5 times slower.
    width, kept = batch.input_ids.shape[1], batch.labels.shape[1]
    logits_BAV = model(
        input_ids=batch.input_ids.to(device),
        attention_mask=batch.attention_mask.to(device),
        position_ids=batch.position_ids.to(device),
        logits_to_keep=torch.arange(width - kept, width, device=device),
        use_cache=bool(more),
        **more,
    ).logits
    return nn.functional.cross_entropy(logits_BAV.flatten(0, 1).float(), batch.labels.to(device).flatten())


def _with_adapter(model: PreTrainedModel, settings: TrainingSettings) -> PeftModel:
    targets: Any = settings.target_modules
    if "," in targets:
        targets = [target.strip() for target in targets.split(",")]
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        use_rslora=settings.rslora,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        return get_peft_model(model, config)  # pyright: ignore[reportReturnType]


def _trainable(model: PeftModel) -> dict[str, nn.Parameter]:
    return {name: p for name, p in sorted(model.named_parameters()) if p.requires_grad}


@torch.no_grad()
def _round_to_bfloat16(parameters: Mapping[str, nn.Parameter]) -> None:
    for parameter in parameters.values():
        parameter.copy_(parameter.to(torch.bfloat16))


def _meter(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    test: Sequence[Example],
    length_normalised: bool,
    progress: Progress,
) -> Callable[[str], float]:
    def measure(phase: str) -> float:
        done = 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            progress(phase, done, len(test), "")

        scores = choice_logprobs(model, tokenizer, test, length_normalised=length_normalised, progress=advance)
        return accuracy(predict(scores), test)

    return measure


def _majority(test: Sequence[Example]) -> float | None:
    if not test or not test[0].choices or len({example.choices for example in test}) > 1:
        return None
    return max(Counter(example.label for example in test).values()) / len(test)


def _fingerprint(settings: dict[str, Any], data: Any, base_model: str, encoded: Encoded) -> str:
    tokens = hashlib.sha256(json.dumps([encoded.prefix, encoded.prompts, encoded.answers]).encode()).hexdigest()
    return hashlib.sha256(json.dumps([settings, data, base_model, tokens], sort_keys=True).encode()).hexdigest()
