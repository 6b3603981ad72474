"""Which adapters are exact on which models: each cell of the support table is computed here and compared with PEFT.

Each row of a batch has an expert of its own, and PEFT has one adapter at a time. The test computes three cells of each
family, so that families take turns in the kinds, and those of past faults. This computes all, and writes
docs/reference/support.md:

    python tests/composition/test_support.py
"""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

from beyond_lora import moved_adapter
from families import FAMILIES, Family
from models import peft_model
from spectr import ExpertLibrary, compose
from spectr.errors import SpectrError
from trained_modules import ROWS

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "support.md"
KINDS = {
    "attention": {},
    "all linear": {"target_modules": None},
    "rsLoRA": {"use_rslora": True, "rank_pattern": {r".*(q|query|c_attn|value|v_proj)": 2}},
    "DoRA": {"use_dora": True},
    "bias of B": {"lora_bias": True},
    "trained biases": {"bias": "lora_only"},
    "PiSSA": {"init_lora_weights": "pissa"},
    "OLoRA": {"init_lora_weights": "olora"},
    "saved norm": {"modules_to_save": None},
}


def settings_of(family: Family, kind: str, model) -> dict:
    """PEFT's settings of an adapter of this kind for a model."""
    targets = family.plain if isinstance(family.plain, str) else list(family.plain)
    found = {"target_modules": targets, **family.options, **KINDS[kind]}
    if found["target_modules"] is None:
        found["target_modules"] = family.targets
    if "modules_to_save" in found:
        norms = [name for name, module in model.named_modules() if "Norm" in type(module).__name__]
        found["modules_to_save"] = [norms[-1].rpartition(".")[2]]
    return found


FORWARD, LEFT, RIGHT, CACHED, UNCACHED = "forward", "padded left", "padded right", "generate", "generate, no cache"
WAYS = {
    "causal": (FORWARD, LEFT, RIGHT, CACHED, UNCACHED),
    "seq2seq": (FORWARD, RIGHT, CACHED, UNCACHED),
    "encoder": (FORWARD, RIGHT),
    "image": (FORWARD,),
}
NO_CACHE = ("reformer",)  # their own generate fails with a cache


def inputs_for(family: Family, way: str) -> dict[str, torch.Tensor]:
    """What a model is given; padded, the second row is shorter than the first."""
    inputs = family.inputs()
    if way in (LEFT, RIGHT):
        mask = torch.ones_like(inputs["input_ids"])
        mask[1, slice(0, 2) if way == LEFT else slice(-2, None)] = 0
        inputs |= {"input_ids": inputs["input_ids"] * mask, "attention_mask": mask}
    elif way != FORWARD:
        inputs.pop("decoder_input_ids", None)
    return inputs


@torch.no_grad()
def output(model, inputs, way):
    """What the model computes for each row, at the tokens that count."""
    if way in (CACHED, UNCACHED):
        options = {"max_new_tokens": 3, "do_sample": False, "use_cache": way == CACHED, "output_logits": True}
        said = model.generate(**inputs, **options, eos_token_id=None, pad_token_id=0, return_dict_in_generate=True)
        return torch.stack(said.logits, dim=1).float()
    out = model(**inputs)
    found, mask = (out.logits if "logits" in out else out.last_hidden_state).float(), inputs.get("attention_mask")
    of_tokens = mask is not None and found.shape[1] == mask.shape[1]
    return found * mask[..., None] if of_tokens else found


def cell(name: str, kind: str, root: Path) -> str:
    """ "yes", or who refuses: "PEFT" or "no"; anything else that happens is raised."""
    family = FAMILIES[name]
    model = family.build()
    options = settings_of(family, kind, model)
    try:
        folders = {each: moved_adapter(model, root / each, seed, **options) for seed, each in enumerate("ab", start=1)}
        way = WAYS[family.kind][list(KINDS).index(kind) % len(WAYS[family.kind])]
        way = UNCACHED if way == CACHED and name in NO_CACHE else way
        inputs = inputs_for(family, way)
        theirs = [output(peft_model(model, folder), inputs, way)[row] for row, folder in enumerate(folders.values())]
    except (ValueError, RuntimeError):  # Mamba's out_proj is refused by PEFT; OLoRA of GPT-2's layers fails in it
        return "PEFT"
    plain = output(model, inputs, way)
    assert all((mine - plain[row]).abs().max() > 1e-4 for row, mine in enumerate(theirs)), "the adapter does nothing"
    try:
        routed = compose(model, ExpertLibrary.from_adapters(folders), ROWS)
        assert routed.prompt is not None
        with routed.prompt.using(torch.eye(2)):
            ours = output(model, inputs, way)
    except SpectrError:
        return "no"
    for row, expected in enumerate(theirs):
        torch.testing.assert_close(ours[row], expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    return "yes"


def row_of(name: str, root: Path) -> str:
    """A model's line of the table."""
    cells = [cell(name, kind, root / str(number)) for number, kind in enumerate(KINDS)]
    return f"| {name} (`{FAMILIES[name].model}`) | {' | '.join(cells)} |"


PAST_FAULTS = {("falcon", "PiSSA"), ("falcon", "OLoRA"), ("gpt2", "OLoRA"), ("gpt2", "PiSSA")}


@pytest.mark.filterwarnings("ignore:.*lora_bias:UserWarning", "ignore:.*OLoRA:UserWarning")  # PEFT's own, of merging
@pytest.mark.parametrize("name", FAMILIES)
def test_the_table_says_what_is_exact(name, tmp_path):
    rows = [text.strip("| ").split(" | ") for text in PAGE.read_text(encoding="utf-8").splitlines()]
    [told] = [cells for head, *cells in rows if head == f"{name} (`{FAMILIES[name].model}`)"]
    assert len(told) == len(KINDS)
    turn = list(FAMILIES).index(name) % 3
    for number, kind in enumerate(KINDS):
        if number % 3 == turn or (name, kind) in PAST_FAULTS:
            assert cell(name, kind, tmp_path / kind) == told[number], kind


def main() -> None:
    lines = []
    for name in FAMILIES:
        with TemporaryDirectory() as root:
            lines.append(row_of(name, Path(root)))
        print(lines[-1], file=sys.stderr)
    before, after = PAGE.read_text(encoding="utf-8").split("<!-- table -->\n")[::2]
    head = [f"| model | {' | '.join(KINDS)} |", "| --- " * (len(KINDS) + 1) + "|"]
    table = "\n".join([*head, *lines])
    PAGE.write_text(f"{before}<!-- table -->\n{table}\n<!-- table -->\n{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
