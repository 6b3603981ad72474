"""torch's default dtype changes no digit of what is prepared, measured, decided or extracted."""

from __future__ import annotations

from contextlib import contextmanager

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


def everything(model: torch.nn.Module, library: ExpertLibrary) -> dict[str, Tensor]:
    known = calibrate(model, library, make_tokenizer(), texts=TEXTS, null=2)
    library = build_index(model, library.with_calibration(known))
    found = {f"mean of {module}": mean for module, mean in known.means.items()}
    found |= {
        f"size of {name}": torch.tensor(list(rms.values()), dtype=torch.float64) for name, rms in known.rms.items()
    }
    found["extracted"] = randomised_svd(DELTA, 3, oversampling=2, power_iterations=1, seed=0).U
    for router in ROUTERS:
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
