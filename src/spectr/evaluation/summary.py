"""The routers side by side: one table from the results of several experiments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from spectr.evaluation.experiments.setup import Result

_COLUMNS = ("routing", "first"), ("wording", "first"), ("wording", "two"), ("multitask", "share"), ("wording", "share")
_HEADINGS = (
    "router",
    "finds the right expert",
    "in other words",
    "among the first two",
    "accuracy, share of the right expert's",
    "the same in other words",
    "most that an odd companion took",
)


def summary(results: Sequence[Result]) -> Result | None:
    """Routers that "routing" measured, with what the other experiments say of them; ``None`` without "routing"."""
    found = {result.name: result for result in results}
    if "routing" not in found:
        return None
    routers = [name for name in found["routing"].data.get("summary", {}) if any(_other(found, name))]
    rows = []
    for router in routers or found["routing"].data.get("summary", {}):
        cells = [_cell(_value(found, experiment, router, what)) for experiment, what in _COLUMNS]
        rows.append([router, *cells, _taken(found, router)])
    used = [name for name in ("routing", "wording", "multitask", "robustness") if name in found]
    notes = [
        f"From the experiments below: {', '.join(used)}. ± one standard error; for a router with several calibration "
        "seeds, the mean over them. Shares of accuracy compare with the right expert on the same examples; their error "
        "is that of the difference.",
        *[note for name in ("routing", "wording") if name in found for note in found[name].notes if " seed" in note],
    ]
    setups = {name: (found[name].origin.get("experts"), found[name].origin.get("model")) for name in used}
    if len({str(setup) for setup in setups.values()}) > 1:
        notes.insert(0, "Warning: these experiments ran with different experts or models.")
    return Result(
        name="summary",
        title="The routers side by side",
        source="prompts, in percent",
        columns=_HEADINGS,
        rows=rows,
        notes=notes,
        origin={"commands": [found[name].origin.get("command", "") for name in used]},
    )


def tradeoff(results: Sequence[Result]) -> Result | None:
    """Quality against cost, held-in and held-out, of the routers that "costs" and "multitask" both measured."""
    found = {result.name: result for result in results}
    if not {"costs", "multitask"} <= set(found):
        return None
    costs, held_in = found["costs"].data, found["multitask"].data["methods"]
    held_out = found["heldout"].data["methods"] if "heldout" in found else {}
    points, rows = {}, []
    for label, cost in costs["routers"].items():
        if label not in held_in:
            continue
        inside, outside = held_in[label], held_out.get(label)
        points[label] = {
            "cost": cost["flops"] / costs["base"],
            "held_in": [inside["share"], inside["error"]],
            "held_out": [outside["gain"], outside["error"]] if outside else None,
        }
        gained = f"{100 * outside['gain']:+.1f} ± {100 * outside['error']:.1f}" if outside else ""
        share = _cell((inside["share"], inside["error"]))
        rows.append([label, f"{points[label]['cost']:.1%}", share, gained])
    used = [name for name in ("costs", "multitask", "heldout") if name in found]
    headings = ("router", "arithmetic added to a token", "held-in, share of the own expert's accuracy")
    return Result(
        name="tradeoff",
        title="Quality against cost",
        source="from the experiments below",
        columns=[*headings, "held-out, points over the base model"],
        rows=rows,
        data={"points": points, "base": held_in["base"]["share"]},
        notes=[
            "Arithmetic per token of an answer, as a share of the base model's. Work before an answer (the calibrated "
            "routers' probe, GLIDER's instruction) is in 'costs'. ± one standard error. In the picture, equal costs "
            "are side by side."
        ],
        origin={"commands": [found[name].origin.get("command", "") for name in used]},
    )


def _other(found: Mapping[str, Result], router: str) -> list[Any]:
    return [_value(found, "multitask", router, "share"), _value(found, "wording", router, "first")]


def _value(found: Mapping[str, Result], experiment: str, router: str, what: str) -> tuple[float, float] | None:
    if experiment not in found:
        return None
    data = found[experiment].data
    if experiment == "multitask":
        method = data["methods"].get(router)
        return (method["share"], method["error"]) if method else None
    values = data["summary"].get(router, {}).get(what)
    return tuple(values) if values else None


def _taken(found: Mapping[str, Result], router: str) -> str:
    cases = found["robustness"].data["cases"].values() if "robustness" in found else ()
    shares = [case[router]["stolen"] for case in cases if router in case]
    return f"{max(shares):.1%}" if shares else ""


def _cell(value: tuple[float, float] | None) -> str:
    if value is None:
        return ""
    return "100%" if tuple(value) == (1.0, 0.0) else f"{value[0]:.1%} ± {value[1]:.1%}"
