"""What an import loads, each in a process of its own: a light core, and optional packages only where they are used."""

from __future__ import annotations

import subprocess
import sys

import pytest

PLOTTING = {"matplotlib"}
SERVING = {"fastapi", "starlette", "uvicorn", "prometheus_client", "vllm"}
TRAINING = {"peft", "datasets", "bitsandbytes"}
EVALUATION = {"lm_eval", "rouge_score", "sentence_transformers", "openai"}
MODELS = {"transformers", "accelerate", "tokenizers", "huggingface_hub", "gguf"}
TERMINAL = {"rich", "typer"}
OPTIONAL = PLOTTING | SERVING | TRAINING | EVALUATION
CORE = (
    "import spectr, spectr.merging, spectr.extraction, spectr.paging;"
    "spectr.ExpertLibrary, spectr.get_router, spectr.compose, spectr.trace"
)


def loaded(code: str) -> set[str]:
    """The packages, other than Python's own and ours, that running this loads."""
    code = f"import sys; before = set(sys.modules); {code}; print(*sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    packages = {name.partition(".")[0] for name in done.stdout.split()}
    assert "spectr" in packages
    return packages - set(sys.stdlib_module_names) - {"spectr"}


def test_spectr_alone_loads_no_other_package():
    assert loaded("import spectr") == set()


@pytest.mark.parametrize(
    ("code", "unneeded"),
    [
        ("import spectr.shipped, spectr.errors, spectr.tasks", OPTIONAL | MODELS | TERMINAL | {"torch", "numpy"}),
        (CORE, OPTIONAL | MODELS | TERMINAL),
        ("import spectr.cli.app", OPTIONAL | MODELS),
        ("import spectr; [getattr(spectr, name) for name in spectr.__all__]", OPTIONAL | TERMINAL),
    ],
    ids=["errors and tasks", "core", "command line", "all public names"],
)
def test_optional_packages_wait_for_their_use(code, unneeded):
    assert loaded(code) & unneeded == set()
