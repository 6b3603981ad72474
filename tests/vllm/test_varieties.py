"""What else an engine can be asked for: unequal ranks, gates, its other way to make models, two ranks and graphs."""

import pytest
import torch
from engine import NAMES, SETS, TOLERANCE, composed, engine, judged, tokens

from models import random_factors, write_adapter
from spectr import ExpertLibrary
from spectr.library import LibraryStore

PROMPT = tokens(20, seed=1)


@pytest.fixture(scope="module")
def unequal(served, tmp_path_factory):
    """The same model, and experts of different ranks."""
    from transformers import AutoModelForCausalLM

    root = tmp_path_factory.mktemp("unequal")
    (root / "model").symlink_to(served / "model")
    model = AutoModelForCausalLM.from_pretrained(served / "model")
    layers = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}
    for seed, name in enumerate(("amber", "blue", "cyan", "dun")):
        factors = {}
        for number, (module, layer) in enumerate(layers.items()):
            A, B = random_factors(2 + 3 * seed, layer.in_features, layer.out_features, 100 * seed + number)
            factors[module] = (A, 0.5 * B)
        write_adapter(root / "library" / name, factors, alpha=8)
    return root


@pytest.fixture(scope="module")
def gated(served, tmp_path_factory):
    """The same model and experts, which have gates."""
    root = tmp_path_factory.mktemp("gated")
    (root / "model").symlink_to(served / "model")
    store = LibraryStore(root / "library")
    for seed, name in enumerate(NAMES):
        store.add(name, served / "library" / name)
        shapes = ExpertLibrary.open(root / "library")[name].shapes
        generator = torch.Generator().manual_seed(seed)
        gates = {module: torch.randn(shape.inputs, generator=generator) for module, shape in shapes.items()}
        store.add_gates(name, gates, {"seed": seed})
    return root


def test_phatgoose(gated):
    router = {"name": "phatgoose", "top_k": 2}
    with engine(gated, router=router) as running:
        answers = running.answers([(PROMPT, experts) for experts in SETS])
    for experts, answer in zip(SETS, answers, strict=True):
        assert judged(composed(gated, experts, router), PROMPT, answer) < TOLERANCE
    with pytest.raises(AssertionError):  # another router is another output
        assert judged(composed(gated, None), PROMPT, answers[0]) < TOLERANCE


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "compiled"])
def test_experts_of_unequal_ranks(unequal, eager, monkeypatch, tmp_path):
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    with engine(unequal, eager=eager, record=True) as running:
        answers = running.answers([(PROMPT, experts) for experts in SETS])
        running.llm.collective_rpc("spectr_remove", args=("cyan",))
        [left] = running.answers([(PROMPT, ["amber", "cyan"])])
    for experts, answer in zip(SETS, answers, strict=True):
        assert judged(composed(unequal, experts), PROMPT, answer) < TOLERANCE
    assert judged(composed(unequal, ["amber"]), PROMPT, left) < TOLERANCE


def test_the_engines_transformers_backend(served):
    with engine(served, model_impl="transformers") as running:
        assert running.status()["modules"] == 14
        answers = running.answers([(PROMPT, experts) for experts in SETS])
    for experts, answer in zip(SETS, answers, strict=True):
        assert judged(composed(served, experts), PROMPT, answer) < TOLERANCE


def test_two_ranks_in_a_compiled_graph_and_without_an_expert(served, monkeypatch, tmp_path):
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    with engine(served, eager=False, tensor_parallel_size=2) as running:
        answers = running.answers([(PROMPT, experts) for experts in SETS])
        told = running.llm.collective_rpc("spectr_remove", args=("cyan",))
        assert [one["experts"] for one in told] == [["amber", "blue", "dun", "ecru"]] * 2
        [left] = running.answers([(PROMPT, ["amber", "cyan"])])
    for experts, answer in zip(SETS, answers, strict=True):
        assert judged(composed(served, experts), PROMPT, answer) < TOLERANCE
    assert judged(composed(served, ["amber"]), PROMPT, left) < TOLERANCE
