"""What the tests of sequences share: a model with three experts, and no gradients unless a test asks for them."""

from __future__ import annotations

import pytest
import torch
from sequences import World, prompts_of

import spectr
from models import tiny_llama, types_unchecked
from spectr.layers.batch_routing import thread
from spectr.prompts import frames


@pytest.fixture(autouse=True)
def no_gradients(request):
    with torch.set_grad_enabled("gradients" in request.fixturenames), types_unchecked():
        yield
    assert thread.routing is None
    assert not frames._frames.get()


@pytest.fixture
def gradients():
    """The test needs gradients."""


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    with torch.no_grad():
        return World(tiny_llama(), tmp_path_factory.mktemp("llama"), calibrated=True)


@pytest.fixture(scope="session")
def shared(world):
    """A model that is used by all, and two prompts that it gives different experts."""
    with torch.no_grad():
        model, routed = world.routed(spectr.Calibrated())
        return model, routed, prompts_of(routed)
