"""Experts with trained modules in batches of requests: each request has its own expert's, or they are refused."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig

import spectr
from models import close, greedy, tiny_llama, tokens, types_unchecked
from rows import together
from spectr.composition.multi_router import MultiRouter
from spectr.composition.request_batch import RequestBatch
from spectr.errors import CompositionError
from trained_modules import ROWS, as_peft, library_of, out

CONFIG = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head", "norm", "embed_tokens"])
ids = tokens(batch=4, length=8)


@pytest.fixture
def trained(tmp_path):
    model = tiny_llama()
    return model, *library_of(model, tmp_path, CONFIG)


def test_requests_of_one_row_hold_an_expert_each_or_none(trained):
    model, library, folders = trained
    peers = {name: as_peft(model, folder) for name, folder in folders.items()}
    sets = [("ants",), ("bees",), (), ("ants", "bees")]
    chosen = ["ants", "bees", None, "ants" if ids[3, 0] % 2 == 0 else "bees"]
    theirs = [out(peers.get(name, model), ids[n : n + 1])[0] for n, name in enumerate(chosen)]
    batch = RequestBatch(spectr.compose(model, library, ROWS))
    decisions = [batch.decide(names, prompt) for names, prompt in zip(sets, ids, strict=True)]
    for ours, peer in zip(together(model, batch, list(zip(decisions, ids, strict=True))), theirs, strict=True):
        close(ours, peer, 1e-4)
    for decision, prompt, peer in zip(decisions, ids, theirs, strict=True):
        close(together(model, batch, [(decision, prompt)])[0], peer, 1e-4)


def test_transformers_own_batches_give_each_request_its_expert(trained):
    from transformers import ContinuousBatchingConfig, GenerationConfig

    model, library, folders = trained
    peers = [as_peft(model, folder) for folder in folders.values()]
    free = {"eos_token_id": -1, "min_new_tokens": None}
    theirs = [greedy(peers[row[0] % 2], ids[n : n + 1], **free)[0, 8:] for n, row in enumerate(ids.tolist())]
    spectr.compose(model, library, ROWS)
    settings = GenerationConfig(max_new_tokens=5, do_sample=False, eos_token_id=-1, pad_token_id=0)
    small = ContinuousBatchingConfig(page_size=32, num_blocks=16, max_batch_tokens=64)
    said = model.generate_batch(ids.tolist(), settings, small, warmup=False)
    found = sorted(said.values(), key=lambda one: int(str(one.request_id).rpartition("_")[2]))
    assert [one.generated_tokens for one in found] == [row.tolist() for row in theirs]


def test_several_routers_of_one_model_are_refused(trained):
    model, library, _ = trained
    makers = {name: lambda inner: spectr.compose(inner, library, ROWS) for name in ("one", "two")}
    with types_unchecked(), pytest.raises(CompositionError, match="with 'one', experts have trained modules"):
        MultiRouter(model, makers)


def test_continuous_batching_of_the_server_is_refused(trained):
    from spectr.serving.engines.generation import Batching

    model, library, _ = trained
    spectr.compose(model, library, ROWS)
    with types_unchecked(), pytest.raises(CompositionError, match="an expert adapts the output head"):
        Batching().start(model, None, {})


def test_an_index_is_refused(trained):
    from text_model import make_tokenizer

    model, library, _ = trained
    library = library.with_calibration(spectr.calibrate(model, library, make_tokenizer(), texts=["the sky", "who is"]))
    with types_unchecked(), pytest.raises(CompositionError, match="and an index reads factors only"):
        spectr.build_index(model, library)


def test_vllm_is_refused(trained):
    from spectr.composed_model import Settings
    from spectr.vllm.worker_state import WorkerState

    _, library, _ = trained
    settings = Settings(library="experts", router={"name": "spectr", "top_k": 1})
    with types_unchecked(), pytest.raises(CompositionError, match="and vLLM reads factors only"):
        WorkerState(settings, library, 16, 4, torch.device("cpu"))


def test_outliers_leave_out_experts_without_factors(tmp_path):
    from peft import TrainableTokensConfig

    from spectr.serving.outliers import outliers_among

    library, _ = library_of(tiny_llama(), tmp_path, TrainableTokensConfig(token_indices=[4]))
    assert outliers_among([library["ants"]]) == {}
