"""Abstention: if no expert fits a prompt, the base model answers it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from spectr.errors import CompositionError
from spectr.library.library import ExpertLibrary
from spectr.library.needs import Need, Nulled

if TYPE_CHECKING:
    from spectr.routers.policy import PromptPolicy
    from spectr.routers.router import Router

Abstain = float | Literal["auto"] | None
AUTO = 0.05  # the value of "auto", if the calibration has enough ordinary prompts


def check_abstain(abstain: Abstain, *, auto: bool = True) -> None:
    """Raise :class:`CompositionError` for a value that is not a share of ordinary prompts.

    Args:
        abstain: The setting's value.
        auto: Whether ``"auto"`` is allowed.
    """
    if abstain is None or (auto and abstain == "auto"):
        return
    if isinstance(abstain, bool) or not isinstance(abstain, (int, float)) or not 0 < abstain < 1:
        raise CompositionError(
            f"abstain={abstain!r}",
            expected="a number above 0 and below 1, None" + (" or 'auto'" if auto else ""),
            do="use 0.05 to send 19 of 20 ordinary prompts to the base model, or None to always choose an expert",
        )


def nulled(abstain: Abstain) -> tuple[Need, ...]:
    """What a library must provide for abstention; nothing if ``"auto"`` leaves it to the library."""
    return () if abstain is None or isinstance(abstain, str) else (Nulled(abstain),)


def policy_for(router: Router, library: ExpertLibrary) -> PromptPolicy | None:
    """A router's policy in a library; resolves ``abstain="auto"``."""
    policy = router.policy
    if policy is None or router.abstain != "auto" or not Nulled(AUTO).is_met(library):
        return policy
    return replace(policy, abstain=AUTO)


def always_choosing(router: Router) -> Router:
    """The same router, which always chooses an expert."""
    return router if router.abstain is None else replace(router, abstain=None)  # pyright: ignore[reportArgumentType]


def why_off(router: Router, library: ExpertLibrary) -> str | None:
    """Why ``abstain="auto"`` is off in a library, as text; ``None`` if it is on or was not set."""
    need = Nulled(AUTO)
    if router.policy is None or router.abstain != "auto" or need.is_met(library):
        return None
    return (
        f"an expert answers every prompt, never the base model alone, since {need.there(library)}; "
        f"to change that, run: {need.remedy(library)}"
    )


def in_words(p: float | None) -> str:
    """For users: the base model answered."""
    return f"no expert {'is used' if p is None else f'stands out (p = {p:.2f})'}: the base model answered"
