"""Decisions for whole prompts: how a prompt is read, what is decided, and for which calls it holds."""

from spectr.prompts.decision import PromptDecision, Reader, decides_by_prompt, entry_of

__all__ = ["PromptDecision", "Reader", "decides_by_prompt", "entry_of"]
