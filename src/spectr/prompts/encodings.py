"""A decision belongs to an encoder's outputs: calls that receive them use it, and no other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from spectr.errors import CompositionError
from spectr.prompts import cache_records as records
from spectr.prompts.arguments import expanded, has_encoder, part_of, same_verdict

if TYPE_CHECKING:
    from spectr.prompts.cache_records import CacheRecord
    from spectr.prompts.calls import Calls


def encoded_verdict(
    calls: Calls, part: str, given: Mapping[str, Any], rows: int, wanted_BE: Tensor | None
) -> Tensor | None:
    """The decision for a call that may receive an encoder's outputs.

    Args:
        calls: Of the composition.
        part: The part of the model that is called.
        given: The call's arguments by name.
        rows: The call's rows.
        wanted_BE: The verdict that the call has to use, for these rows; ``None`` if it is that of the outputs.

    Raises:
        CompositionError: Other experts or another decision computed the outputs, or it is unknown what did.
    """
    outputs = given.get("encoder_outputs") if part == "model" else given.get("encoder_hidden_states")
    if part == "encoder" or outputs is None or (part == "model" and not has_encoder(calls.model)):
        return wanted_BE
    record = records.record_of(outputs if isinstance(outputs, Tensor) else outputs[0])
    if record is None and (wanted_BE is not None or calls.prompt is None):
        return wanted_BE
    if record is None or record.composition != calls.key or record.allowed != calls.experts:
        raise CompositionError(
            "there is no decision for these encoder outputs",
            expected="the tensor that this model's encoder returned with the experts that are allowed now",
            do="pass the encoder's input, or encode it again; to change rows, decide yourself: "
            "with routed.prompt.using(routed.prompt.decide(...)): ...",
        )
    if record.verdict_BE is None:
        return wanted_BE
    verdict_BE = expanded(record.verdict_BE, rows, None)
    if wanted_BE is not None and not same_verdict(verdict_BE, wanted_BE):
        raise CompositionError(
            "these encoder outputs were computed under another decision than the one that holds now",
            do="encode the input again, or use the decision that it was encoded under",
        )
    return verdict_BE


def note_encoded(calls: Calls, part: str, given: Mapping[str, Any], out: Any, record: CacheRecord) -> None:
    """Store the decision with what an encoder returned. A call does not know who computed outputs that it was given."""
    if not has_encoder(calls.model) or given.get("encoder_outputs") is not None:
        return
    hidden = part_of(out, "last_hidden_state" if part == "encoder" else "encoder_last_hidden_state")
    if isinstance(hidden, Tensor):
        records.attach(hidden, calls.fresh(record.verdict_BE, None))
