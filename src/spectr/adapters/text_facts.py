"""Compare how the tokenizers and chat templates of an adapter and its base model write prompts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from spectr.adapters.expert import Expert
from spectr.errors import AdapterError, some_of
from spectr.folders import json_object

TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "added_tokens.json")
TEXT_FACTS_FILE = "text.json"  # replaces these files for a library's experts
_SHOWN = 4
_EMPTY = {"version": "1.0", "added_tokens": [], "model": {"type": "WordLevel", "vocab": {}, "unk_token": ""}}


@dataclass(frozen=True, kw_only=True)
class TextFacts:
    """Facts that determine how a prompt becomes tokens.

    Attributes:
        template: Digest of the chat template; ``None`` if there is none.
        vocabulary: Digest of the tokenizer's vocabulary without added tokens; ``None`` if unknown.
        tokens: Added tokens and their ids.
        size: The largest id plus one; 0 if no id is known.
        rules: By name, digests of the rules by which the tokenizer splits texts.
        end: The token that ends an answer.
        rows: In a base model's folder, the rows of its embedding; 0 if unknown.
    """

    template: str | None = None
    vocabulary: str | None = None
    tokens: Mapping[str, int] = field(default_factory=dict)
    size: int = 0
    rules: Mapping[str, str] = field(default_factory=dict)
    end: str | None = None
    rows: int = 0

    @staticmethod
    def read(folder: Path) -> TextFacts | None:
        """The facts of a folder; ``None`` if it has no readable tokenizer files."""
        try:
            kept = json_object(folder / TEXT_FACTS_FILE)
            return TextFacts(**kept) if kept else TextFacts._of_files(folder)
        except (KeyError, TypeError, ValueError, AttributeError):  # files in another format
            return None

    @staticmethod
    def _of_files(folder: Path) -> TextFacts | None:
        whole, settings = json_object(folder / "tokenizer.json"), json_object(folder / "tokenizer_config.json")
        tokens: dict[str, int] = {**json_object(folder / "added_tokens.json")}
        tokens |= {row["content"]: int(id) for id, row in (settings.get("added_tokens_decoder") or {}).items()}
        tokens |= {row["content"]: row["id"] for row in whole.get("added_tokens", ())}
        vocabulary = (whole.get("model") or {}).get("vocab") or {}
        if isinstance(vocabulary, list):  # pieces with scores, in the order of ids
            vocabulary = {piece: id for id, (piece, *_) in enumerate(vocabulary)}
        template = _template(folder, settings)
        if not (tokens or vocabulary or template):
            return None
        return TextFacts(
            template=_digest(template.strip()) if template else None,
            vocabulary=_digest(sorted(vocabulary.items())) if vocabulary else None,
            tokens=tokens,
            size=1 + max((*vocabulary.values(), *tokens.values()), default=-1),
            rules=_rules(whole) if whole else {},
            end=end["content"] if isinstance(end := settings.get("eos_token"), dict) else end,
            rows=_rows(json_object(folder / "config.json")),
        )

    def write(self, folder: Path) -> None:
        """Store the facts in a folder, without the files."""
        (folder / TEXT_FACTS_FILE).write_text(json.dumps(asdict(self), sort_keys=True) + "\n", encoding="utf-8")

    def faults(self, base: TextFacts) -> Iterator[str]:
        """Why the base model's tokenizer writes other tokens than the adapter's, as texts after its name."""
        if self.vocabulary and base.vocabulary and self.vocabulary != base.vocabulary:
            yield "has a tokenizer whose vocabulary differs from the base model's"
        moved = [token for token, id in self.tokens.items() if base.tokens.get(token, id) != id]
        owners = {id: token for token, id in base.tokens.items()}
        moved += [token for token, id in self.tokens.items() if owners.get(id, token) != token]
        if moved:
            shown = some_of(sorted(set(moved)), _SHOWN)
            yield f"has token ids that the base model's tokenizer uses for other tokens: {shown}"

    def remarks(self, base: TextFacts, rows: int | None = None) -> Iterator[str]:
        """Further differences from the base model; texts that follow the adapter's name.

        Args:
            base: Facts of the base model.
            rows: Rows of the base model's embedding; by default those of its configuration.
        """
        if self.template and self.template != base.template:
            has = "another chat template than" if base.template else "a chat template, unlike"
            yield f"has {has} the base model; SpectR writes prompts with the base model's tokenizer"
        other = sorted(name for name, rule in self.rules.items() if base.rules.get(name, rule) != rule)
        if other:
            yield f"has a tokenizer that reads texts by other rules than the base model's: {', '.join(other)}"
        if self.end and base.end and self.end != base.end:
            yield f"ends answers with {self.end}, the base model with {base.end}"
        new = sorted(set(self.tokens) - set(base.tokens)) if base.vocabulary or base.tokens else []
        if new:
            yield f"has tokens that the base model's tokenizer does not have: {some_of(new, _SHOWN)}"
        rows = rows or base.rows
        if rows and self.size > max(rows, base.size):
            yield f"was trained with a resized embedding: it has {self.size} tokens, the base model {rows}"


def base_texts(base_model: str | None) -> TextFacts | None:
    """The facts of a base model, from a folder or the Hub's cache; ``None`` if neither has it."""
    if not base_model:
        return None
    if Path(base_model).is_dir():
        return TextFacts.read(Path(base_model))
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(base_model, "tokenizer_config.json")
    except HFValidationError:
        return None
    return TextFacts.read(Path(cached).parent) if isinstance(cached, str) else None


def _rules(whole: Mapping[str, Any]) -> dict[str, str]:
    """Digests of the parts of ``tokenizer.json`` that decide how a text becomes tokens of the vocabulary."""
    merges = (whole.get("model") or {}).get("merges") or []
    pairs = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]  # older files have texts
    parts = {part: whole.get(part) for part in ("normalizer", "pre_tokenizer", "post_processor")}
    with suppress(Exception):  # as tokenizers writes them, since older files leave defaults out; else as they are
        from tokenizers import Tokenizer

        parts = {part: json.loads(Tokenizer.from_str(json.dumps({**_EMPTY, **parts})).to_str())[part] for part in parts}
    return {part: _digest(rule) for part, rule in parts.items()} | {"merges": _digest(pairs)}


def _rows(config: Mapping[str, Any]) -> int:
    return config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size") or 0


def _template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):  # several by name
        template = next((row["template"] for row in template if row.get("name") == "default"), None)
    return template


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def check_text(expert: Expert) -> None:
    """Check that the base model's tokenizer writes the tokens that the expert's own tokenizer writes.

    Nothing is compared if the base model's tokenizer is not on this machine.

    Raises:
        AdapterError: They differ.
    """
    facts, base = TextFacts.read(expert.weights.parent), base_texts(expert.base_model)
    if facts and base and (faults := list(facts.faults(base))):
        raise AdapterError(
            f"expert '{expert.name}' {'; and '.join(faults)}",
            expected=f"a tokenizer that writes the tokens of its base model ({expert.base_model})",
            do="add it to a library of a base model with the same tokenizer",
        )


def text_remarks(folder: Path, base_model: str | None) -> list[str]:
    """Further differences from the base model's tokenizer; texts that follow the adapter's name."""
    facts, base = TextFacts.read(folder), base_texts(base_model)
    if facts is None:
        return []
    if base is None:
        return ["has a tokenizer that was not checked: its base model's tokenizer is not on this machine"]
    return list(facts.remarks(base))
