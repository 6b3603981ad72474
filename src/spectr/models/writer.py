"""Models that write short texts for the program: loaded here, or behind an endpoint."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Protocol

from spectr.errors import DataError, MissingExtraError
from spectr.layers.eval_mode import eval_mode
from spectr.models.generate import generate_answers


class Writer(Protocol):
    """Answers prompts; ``written`` counts its tokens so far."""

    written: int

    def __call__(self, prompts: Sequence[str]) -> list[str]:
        """Write one text for each prompt."""
        ...


class LocalWriter:
    """A transformers model that always takes the most likely tokens.

    Args:
        model: Causal, or with an encoder and a decoder.
        tokenizer: Its tokenizer.
        max_new_tokens: Maximum length of a text.
        batch_size: Prompts per batch.
    """

    def __init__(self, model: Any, tokenizer: Any, *, max_new_tokens: int = 40, batch_size: int = 16):
        self.model, self.tokenizer, self.max_new_tokens, self.batch_size = model, tokenizer, max_new_tokens, batch_size
        self.written = 0

    def __str__(self) -> str:
        return f"LocalWriter({os.path.basename(str(self.model.config.name_or_path))}, {self.max_new_tokens} tokens)"

    def __call__(self, prompts: Sequence[str]) -> list[str]:
        """Write one text for each prompt."""
        texts: list[str] = []
        for start in range(0, len(prompts), self.batch_size):
            some = list(prompts[start : start + self.batch_size])
            with eval_mode(self.model):
                texts += generate_answers(self.model, self.tokenizer, some, max_new_tokens=self.max_new_tokens)
        self.written += sum(len(self.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts)
        return texts


class EndpointWriter:
    """A chat model behind an endpoint with OpenAI's API.

    Args:
        url: Its base URL, such as ``http://localhost:8000/v1``.
        model: Its name there; may be empty if there is only one.
        max_new_tokens: Maximum length of a text.
        api_key: By default the environment variable ``OPENAI_API_KEY``.
    """

    def __init__(self, url: str, model: str = "", *, max_new_tokens: int = 40, api_key: str | None = None):
        try:
            from openai import OpenAI
        except ImportError as error:
            raise MissingExtraError("asking an endpoint", "glider") from error
        self.url, self.model, self.max_new_tokens, self.written = url, model, max_new_tokens, 0
        self.client = OpenAI(base_url=url, api_key=api_key or os.environ.get("OPENAI_API_KEY") or "none")

    def __str__(self) -> str:
        return f"EndpointWriter({self.url}, {self.model}, {self.max_new_tokens} tokens)"

    def __call__(self, prompts: Sequence[str]) -> list[str]:
        """Write one text for each prompt.

        Raises:
            DataError: The endpoint does not answer, or its answer is invalid.
        """
        return [self._answer(prompt) for prompt in prompts]

    def _answer(self, prompt: str) -> str:
        from openai import OpenAIError

        try:
            reply = self.client.chat.completions.create(
                messages=[{"role": "user", "content": prompt}],
                model=self.model,
                max_tokens=self.max_new_tokens,
                temperature=0.0,
            )
        except OpenAIError as error:
            raise DataError(
                f"{self.url} did not answer: {type(error).__name__}: {error}",
                expected="an endpoint with OpenAI's protocol",
                do="check the address (with /v1), the model's name after '#', and OPENAI_API_KEY",
            ) from error
        self.written += reply.usage.completion_tokens if reply.usage else 0
        return (reply.choices[0].message.content or "").strip()
