"""Layers hold the tensors of a router that they do not know."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from torch.nn.functional import linear

from one_layer import EQUAL, UNEQUAL, one_layer_library, plain_layer, some_tokens
from spectr import Arrow, compose
from spectr.routers import Router
from spectr.selection import TopK
from spectr.spectral import Share


class Two(NamedTuple):
    """A row for each expert, and one for each row of its factor."""

    likes_EI: torch.Tensor
    weights_P: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Theirs(Router):
    """``likes_t . x + sum_r weights_r |h_r|``."""

    reads = "xh"
    top_k: int = 2

    @property
    def selection(self):
        return TopK(k=self.top_k, weighting="softmax")

    def init_expert(self, expert, side):
        return Share.spectral(expert.aligned)._replace(own=Two(expert.aligned.Vh[:1] * 2, expert.aligned.S.sqrt()))

    def scores(self, state, x_TI, h_TP, allowed_TE):
        own = state.own
        return linear(x_TI, own.likes_EI).float() + linear((h_TP * own.weights_P).abs(), state.member_EP).float()


@pytest.mark.parametrize("ranks", [EQUAL, UNEQUAL], ids=["equal", "unequal"])
def test_a_layer_scores_by_tensors_of_a_router_that_it_does_not_know(tmp_path, ranks):
    library, x_TI, model, router = one_layer_library(tmp_path, ranks), some_tokens(), plain_layer(), Theirs()
    compose(model, library, router)
    parts = model.layer.stack().parts()
    expected = [
        x_TI @ own.likes_EI[0] + (x_TI @ A.mT * own.weights_P).abs().sum(-1)
        for A, _, own in (part[:3] for part in parts.values())
    ]
    torch.testing.assert_close(model.layer.route(x_TI).scores_TE, torch.stack(expected, -1), rtol=1e-4, atol=1e-4)
    assert {"likes_EI", "weights_P"} <= set(dict(model.layer.named_buffers()))
    assert not {"likes_EI", "weights_P"} & set(model.state_dict())


def test_they_move_and_are_copied_with_the_layer(tmp_path):
    model = plain_layer()
    compose(model, one_layer_library(tmp_path, EQUAL), Theirs())
    own = copy.deepcopy(model).double().layer.factors.own
    assert type(own) is Two
    assert {tensor.dtype for tensor in own} == {torch.float64}
    assert {tensor.dtype for tensor in model.layer.factors.own} == {torch.float32}


def test_another_router_takes_their_place(tmp_path):
    library, model = one_layer_library(tmp_path, EQUAL), plain_layer()
    compose(model, library, Theirs()).remove()
    compose(model, library, Arrow())
    assert "weights_P" not in dict(model.layer.named_buffers())


def test_products_are_not_made_for_scores_that_do_not_read_them(tmp_path, monkeypatch):
    model = plain_layer()
    compose(model, one_layer_library(tmp_path, EQUAL), Arrow())
    monkeypatch.setattr(Arrow, "inputs", lambda *_: pytest.fail("products"))
    assert model.layer.scores(some_tokens()).shape[-1] == len(EQUAL)
