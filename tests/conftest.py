"""Before anything else: no network, one thread, and shapes and types of the numerics checked while the tests run."""

import os
import signal

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault(
    "SPECTR_KERNELS", "rows:16,tiles,torch+tiles,torch+sums"
)  # timing would decide otherwise each time

from importlib.util import find_spec
from unittest.mock import Mock

import torch
from jaxtyping import install_import_hook

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported by whatever test is first

# The modules whose signatures carry shapes. Elsewhere a wrong type has to reach our own error, not the checker's; and
# Triton's interpreter has to find its kernels as they are written.
CHECKED = (
    "spectr.combine",
    "spectr.evaluation",
    "spectr.extraction.svd",
    *(f"spectr.layers.{name}" for name in ("multi_routed", "routed_linear", "trace")),
    "spectr.merging.dare",
    "spectr.merging.lowrank",
    "spectr.merging.ties",
    *(f"spectr.ops.{name}" for name in ("add_outputs", "grouped", "reference_ops", "rules")),
    "spectr.routers",
    "spectr.selection",
    "spectr.spectral",
)
install_import_hook(list(CHECKED), "beartype.beartype")

pytest_plugins = ("shared_fixtures",)  # they import spectr, which has to come after the hook

torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has what it starts in the background ignore Ctrl-C


def pytest_sessionstart() -> None:
    """PEFT writes no model cards: that takes longer than the rest of saving, and no test reads them."""
    from peft import PeftModel

    PeftModel.create_or_update_model_card = Mock()
    assert all(map(find_spec, CHECKED)), "a module has a new name"
