"""torch's default dtype and a caller's autocast change no digit of what is prepared, measured, decided or extracted."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from models import logits, peft_library, random_factors, tiny_llama, tokens
from spectr import Calibrated, ExpertLibrary, Oracle, Seqr, Spectr, build_index, calibrate, compose, trace
from spectr.extraction.svd import randomised_svd
from text_model import make_tokenizer

ids = tokens(batch=2, length=6)
TEXTS = ["what is the colour of the sky", "is the film good"]
DELTA = random_factors(9, 7, 8, seed=1)[0]
ROUTERS = [Oracle(expert="ants"), Spectr(top_k=2, combine="dare-ties"), Seqr(), Calibrated(abstain=None)]


@contextmanager
def by_default(dtype: torch.dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return peft_library(
        tiny_llama(num_hidden_layers=1), tmp_path_factory.mktemp("adapters"), {"ants": 6, "bees": 6}, lora_alpha=11
    )


def everything(
    model: torch.nn.Module, library: ExpertLibrary, preparing: Callable[[], AbstractContextManager[Any]] = nullcontext
) -> dict[str, Tensor]:
    with preparing():
        known = calibrate(model, library, make_tokenizer(), texts=TEXTS, null=2)
        library = build_index(model, library.with_calibration(known))
    found = {f"mean of {module}": mean for module, mean in known.means.items()}
    found |= {
        f"size of {name}": torch.tensor(list(rms.values()), dtype=torch.float64) for name, rms in known.rms.items()
    }
    with preparing():
        found["extracted"] = randomised_svd(DELTA, 3, oversampling=2, power_iterations=1, seed=0).U
    for router in ROUTERS:
        with preparing():
            routed = compose(model, library, router)
        with trace(model) as record:
            found[f"logits of {router}"] = logits(model, ids)
        found[f"weights of {router}"] = record.weights()
        routed.remove()
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_no_digit_depends_on_the_default_dtype(library, dtype):
    model = tiny_llama(num_hidden_layers=1)
    want = everything(model, library)
    with by_default(dtype):
        found = everything(model, library)
    assert found.keys() == want.keys()
    for name, tensor in want.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def test_no_digit_depends_on_an_autocast_around_the_preparation(library):
    model = tiny_llama(num_hidden_layers=1)
    want = everything(model, library)
    found = everything(model, library, lambda: torch.autocast("cpu", torch.bfloat16))
    for name, tensor in want.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("router", [Oracle(expert="ants"), Spectr(top_k=2), Calibrated(abstain=None)], ids=str)
def test_a_call_under_autocast_rounds_products_alone(library, router):
    """Kernels read numbers of one dtype, so torch has to compute where autocast changes some."""
    model = tiny_llama(num_hidden_layers=1)
    known = calibrate(model, library, make_tokenizer(), texts=TEXTS, null=2)
    compose(model, library.with_calibration(known), router)
    want = logits(model, ids)
    with torch.autocast("cpu", torch.bfloat16):
        found = logits(model, ids)
    assert 0 < (found - want).norm() < 0.05 * want.norm()
