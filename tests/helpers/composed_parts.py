"""A worker's session of tiny experts, and engines' configs, without an engine."""

import torch

from models import random_factors, write_adapter
from spectr import ExpertLibrary
from spectr.composed_model import Settings
from spectr.vllm.worker_state import WorkerState

MODULES = ("model.layers.0.mlp.up_proj", "model.layers.0.mlp.gate_proj")


def session_of(root, names, tokens=16):
    for seed, name in enumerate(names):
        factors = {module: random_factors(2, 6, 8, 10 * seed + n) for n, module in enumerate(MODULES)}
        write_adapter(root / name, factors)
    settings = Settings(library=str(root), router={"name": "spectr", "top_k": 2})
    return WorkerState(settings, ExpertLibrary.open(root), tokens, 4, torch.device("cpu"))


def several(*routers):
    """The config of an engine with these routers, by name or with settings."""
    first, *others = [{"name": router} if isinstance(router, str) else router for router in routers]
    return Settings(library="experts", router=first, other_routers=others)
