"""Which row and position a layer's inputs belong to, in models whose layers are not given (rows, tokens, features)."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from families import FAMILIES
from guides import Guide
from models import VOCAB, close, peft_library
from picked_experts import PickedExperts
from spectr import Glider, Oracle, Spectr, compose, trace
from spectr.errors import CompositionError
from spectr.layers.linear_layers import features
from spectr.layers.token_layout import Layout, Layouts
from spectr.prompts.token_places import read_tokens

UNUSUAL = ["opt", "qwen2-moe", "jetmoe", "deepseek-v3", "xlnet", "reformer", "longformer", "led"]
LENGTHS = 8, 5, 3


class Picking(nn.Module):
    """A language model of such layers."""

    def __init__(self):
        super().__init__()
        self.embed, self.layers = nn.Embedding(VOCAB, 8), nn.Sequential(PickedExperts(), PickedExperts())
        self.head = nn.Linear(8, VOCAB)

    def forward(self, input_ids, attention_mask=None):
        return self.head(self.layers(self.embed(input_ids)))


def picking():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Picking().eval()


def read(model, layouts, names, given, counted):
    found = {}

    def see(name, x, rows, _):
        assert name not in found
        found[name] = x, rows

    with torch.no_grad():
        read_tokens(model, layouts, names, see, given, counted)
    return found


def agree(whole, alone):
    """Of each row what the model computes for it alone."""
    assert whole.keys() >= {name for parts in alone for name in parts}
    for name, (x, rows) in whole.items():
        for row, parts in enumerate(alone):
            if name in parts:
                close(sorted_rows(x[rows == row]), sorted_rows(parts[name][0]))
            else:
                assert not (rows == row).any()


def sorted_rows(x):
    return x[x[:, 0].argsort()]


@pytest.mark.parametrize("name", [*UNUSUAL, "llama", "mamba", "picking"])
def test_counted_tokens_of_a_padded_batch_are_those_of_each_row_alone(name):
    model = picking() if name == "picking" else FAMILIES[name].build()
    model = model.get_encoder() if name == "led" else model
    names = {module: path for path, module in model.named_modules() if features(module) and path != "lm_head"}
    layouts = Layouts(names)
    ids = FAMILIES["llama"].inputs(rows=3, length=8)["input_ids"]
    mask = torch.arange(8) < torch.tensor(LENGTHS)[:, None]
    whole = read(model, layouts, names, {"input_ids": ids, "attention_mask": mask.long()}, mask)
    alone = [
        read(model, layouts, names, {"input_ids": ids[i : i + 1, :n]}, torch.ones(1, n, dtype=torch.bool))
        for i, n in enumerate(LENGTHS)
    ]
    agree(whole, alone)


def test_windows_of_images_are_known_by_rows():
    model, given = FAMILIES["swin"].build(), FAMILIES["swin"].inputs(rows=3)
    names = {module: path for path, module in model.named_modules() if features(module)}
    layouts = Layouts(names)
    whole = read(model, layouts, names, given, None)
    agree(whole, [read(model, layouts, names, {"pixel_values": p[None]}, None) for p in given["pixel_values"]])


def test_a_batch_with_as_many_rows_as_tokens_tells_both_orders_apart():
    model = FAMILIES["xlnet"].build()
    layer = model.transformer.layer[0].ff.layer_1
    layouts = Layouts([layer, model.lm_loss])
    read(model, layouts, {}, FAMILIES["xlnet"].inputs(rows=5, length=5), None)
    assert layouts.known == {layer: Layout(tokens_first=True), model.lm_loss: Layout()}


class GuideByRow(Guide):
    """Row ``i`` has expert ``i % 2``."""

    def reader(self, descriptions, names):
        def read(*args, **given):
            rows = len(next(iter(given.values())))
            return torch.eye(len(names))[torch.arange(rows) % 2]

        return read


@pytest.mark.parametrize("name", [*UNUSUAL, "swin", "picking"])
def test_rows_with_an_expert_each_are_each_row_with_its_expert(name, tmp_path):
    base = picking() if name == "picking" else FAMILIES[name].build()
    given = FAMILIES["llama" if name == "picking" else name].inputs(rows=4, length=4)
    targets = r".*experts\.\d\.[02]|head" if name == "picking" else "all-linear"
    library = peft_library(base, tmp_path, {"ants": 4, "bees": 2}, targets=targets)
    library = library.with_descriptions({"ants": "one", "bees": "two"})
    model = copy.deepcopy(base)
    compose(model, library, Glider(token_router=None, top_k=1), guide=GuideByRow())
    with torch.no_grad():
        out = logits_of(model(**given))
        for row in range(4):
            alone = copy.deepcopy(base)
            compose(alone, library, Oracle(expert=("ants", "bees")[row % 2]))
            close(out[row], logits_of(alone(**{key: value[row : row + 1] for key, value in given.items()}))[0])


def logits_of(out):
    return out if isinstance(out, torch.Tensor) else out[0]


@pytest.mark.parametrize("name", ["opt", "xlnet", "qwen2-moe"])
def test_a_trace_is_by_rows_and_tokens(name, tmp_path):
    base, given = FAMILIES[name].build(), FAMILIES[name].inputs(rows=2, length=4)
    model = copy.deepcopy(base)
    compose(model, peft_library(base, tmp_path, {"ants": 4, "bees": 2}), Spectr(top_k=1))
    rows = []
    for row in (slice(0, 2), slice(0, 1), slice(1, 2)):
        with trace(model) as record, torch.no_grad():
            model(**{key: value[row] for key, value in given.items()})
        rows.append({layer: found.scores for layer, found in record.items()})
    both, *alone = rows
    for layer, scores in both.items():
        assert scores.shape[:2] == (2, 4)
        close(scores, torch.cat([one[layer] for one in alone]))


def test_what_cannot_be_followed_is_refused(tmp_path):
    """Inputs that are not made of a row's tokens alone."""

    class Mixing(Picking):
        def forward(self, input_ids, attention_mask=None):
            x = self.embed(input_ids)
            return self.head(torch.fft.fft(x.flatten(0, 1), dim=0).real[: len(input_ids) + 1])

    model = Mixing().eval()
    library = peft_library(model, tmp_path, {"ants": 4, "bees": 2}, targets=["head"])
    compose(
        model,
        library.with_descriptions({"ants": "one", "bees": "two"}),
        Glider(token_router=None, top_k=1),
        guide=GuideByRow(),
    )
    with pytest.raises(CompositionError, match=r"rows that have different experts(.|\n)*one prompt at a time"):
        model(input_ids=torch.tensor([[3, 4, 5], [6, 7, 8]]))
