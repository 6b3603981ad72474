"""The vLLM plugin chooses nothing by itself: selections, scores and evidence are the package's own functions."""

import ast
from pathlib import Path

import pytest

import spectr.vllm

FILES = sorted(Path(spectr.vllm.__file__).parent.glob("*.py"))
OTHERS = {"topk", "sort", "argmax", "softmax", "log_softmax"}


def called(tree):
    """The last parts of the names of what is called."""
    functions = (node.func for node in ast.walk(tree) if isinstance(node, ast.Call))
    return {getattr(function, "attr", getattr(function, "id", "")) for function in functions}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_no_file_of_the_plugin_selects_or_weighs_experts(path):
    assert not called(ast.parse(path.read_text(encoding="utf-8"))) & OTHERS


def test_calls_are_found():
    assert called(ast.parse("scores.topk(2)\nsoftmax(x)")) == {"topk", "softmax"}
