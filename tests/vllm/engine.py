"""An engine with a routed model, and the same model composed in transformers as its judge."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

import spectr
from models import random_factors, tiny_llama, write_adapter
from spectr.vllm import EXPERTS

os.environ |= {
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
}

NAMES = ("amber", "blue", "cyan", "dun", "ecru")
SETS: tuple[Sequence[str] | None, ...] = (None, ["amber"], ["amber", "cyan"], ["blue", "cyan", "dun"])
ROUTER = {"name": "spectr", "top_k": 2}
VOCABULARY = 300
TOLERANCE = 2e-4  # nats, float32


class Answer(NamedTuple):
    """Generated ids, their log-probabilities and those of the prompt's tokens but the first."""

    ids: list[int]
    new: torch.Tensor
    prompt: torch.Tensor


def make_world(root: Path) -> Path:
    sizes = {"hidden_size": 128, "intermediate_size": 160, "vocab_size": VOCABULARY, "max_position_embeddings": 512}
    model = tiny_llama(**sizes, tie_word_embeddings=False)
    model.save_pretrained(root / "model")
    layers = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}
    for seed, name in enumerate(NAMES):
        factors = {}
        for number, (module, layer) in enumerate(layers.items()):
            A, B = random_factors(4, layer.in_features, layer.out_features, 100 * seed + number)
            factors[module] = (A, 0.5 * B)
        write_adapter(root / "library" / name, factors, alpha=8)
    return root


def tokens(length: int, seed: int = 0) -> list[int]:
    return torch.randint(3, 300, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@contextmanager
def engine(world: Path, *, router: dict[str, Any] = ROUTER, eager: bool = True, **options: Any) -> Iterator[Engine]:
    from vllm import LLM

    ours = {key: options.pop(key) for key in ("access", "record", "inner", "other_routers") if key in options}
    config = {"quant_method": "spectr", "library": str(world / "library"), "router": router, **ours}
    small = {"max_model_len": 256, "max_num_batched_tokens": 256, "max_num_seqs": 8, "dtype": "float32"}
    llm = LLM(
        str(world / "model"),
        skip_tokenizer_init=True,
        enforce_eager=eager,
        disable_log_stats=False,
        hf_overrides={"quantization_config": config},
        **{**small, **options},
    )
    try:
        yield Engine(llm)
    finally:
        llm.llm_engine.engine_core.shutdown()


class Engine:
    """What the tests ask of a running engine."""

    def __init__(self, llm: Any):
        self.llm = llm

    def answers(
        self, requests: Sequence[tuple[list[int], Any]], new: int = 8, prompt: bool = True, **extra: Any
    ) -> list[Answer]:
        """Greedy answers of a batch; each request is a prompt and its ``spectr_experts``, ``None`` to leave it out."""
        from vllm import SamplingParams

        common = {"temperature": 0, "max_tokens": new, "logprobs": 0, "ignore_eos": True, "detokenize": False}
        params = [
            SamplingParams(
                **common,
                prompt_logprobs=0 if prompt else None,
                extra_args={**extra, **({} if experts is None else {EXPERTS: experts})},
            )
            for _, experts in requests
        ]
        prompts = [{"prompt_token_ids": ids} for ids, _ in requests]
        return [_answer(out) for out in self.llm.generate(prompts, params, use_tqdm=False)]

    def status(self) -> dict[str, Any]:
        return self.llm.collective_rpc("spectr_status")[0]

    def counter(self, name: str) -> float:
        return sum(m.value for m in self.llm.get_metrics() if m.name == name)


def _answer(out: Any) -> Answer:
    ids = list(out.outputs[0].token_ids)
    new = torch.tensor([at[token].logprob for at, token in zip(out.outputs[0].logprobs, ids, strict=True)])
    known = out.prompt_logprobs or [None]
    prompt = [at[token].logprob for at, token in zip(known[1:], out.prompt_token_ids[1:], strict=False)]
    return Answer(ids, new, torch.tensor(prompt))


def composed(world: Path, experts: Sequence[str] | None, router: dict[str, Any] = ROUTER) -> torch.nn.Module:
    """The model in transformers, restricted to these experts; to none of them: the base model."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(world / "model", dtype=torch.float32).eval()
    if experts is None or len(experts):
        options = {key: value for key, value in router.items() if key != "name"}
        routed = spectr.compose(model, world / "library", spectr.get_router(router["name"], **options))
        routed.allow(experts)
    return model


def judged(model: torch.nn.Module, prompt: list[int], answer: Answer) -> float:
    """The largest difference of any log-probability; the greedy tokens must be the very same."""
    with torch.no_grad():
        logs = model(torch.tensor([prompt + answer.ids])).logits[0].log_softmax(-1)
    begin = len(prompt) - 1
    assert logs[begin:-1].argmax(-1).tolist() == answer.ids
    ids = torch.tensor(prompt + answer.ids)[1:]
    ours = logs[:-1].gather(-1, ids[:, None])[:, 0]
    theirs = torch.cat([answer.prompt, answer.new])
    return float((ours[len(ours) - len(theirs) :] - theirs).abs().max())


def assert_alike(one: Answer, other: Answer, tolerance: float = TOLERANCE) -> None:
    assert one.ids == other.ids
    torch.testing.assert_close(one.new, other.new, rtol=0, atol=tolerance)
