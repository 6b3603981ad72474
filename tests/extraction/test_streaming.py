"""Memory: what is read at a time, and what is worked out beforehand."""

import weakref

import pytest
import torch
from checkpoints import linear_change, save_pair, take, updates

from models import tiny_llama
from spectr.errors import ExtractionError
from spectr.extraction import Extraction, checkpoint
from spectr.extraction.architecture import Linear
from spectr.extraction.checkpoint import BLOCK, block_rows, read_checkpoint
from spectr.extraction.extraction_settings import plan
from spectr.extraction.svd import exact_bytes, randomised_bytes


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return save_pair(tmp_path_factory.mktemp("pair"), tiny_llama(), linear_change(3))


class Spy:
    """Stands before an open file, and notes each block that is read and which earlier ones still live."""

    def __init__(self, file, notes):
        self.file, self.notes = file, notes

    def __enter__(self):
        self.file.__enter__()
        return self

    def __exit__(self, *what):
        return self.file.__exit__(*what)

    def keys(self):
        return self.file.keys()

    def get_tensor(self, name):
        raise AssertionError(f"{name} was read whole")

    def get_slice(self, name):
        return SpySlice(self.file.get_slice(name), self.notes)


class SpySlice:
    def __init__(self, part, notes):
        self.part, self.notes = part, notes

    def __getattr__(self, name):
        return getattr(self.part, name)

    def __getitem__(self, rows):
        block = self.part[rows]
        self.notes["alive"].append(sum(ref() is not None for ref in self.notes["blocks"]))
        self.notes["blocks"].append(weakref.ref(block))
        self.notes["sizes"].append(block.numel())
        return block


def test_two_blocks_are_in_memory_at_a_time_and_never_a_whole_model(pair, tmp_path, monkeypatch):
    base, tuned, changes = pair
    notes = {"alive": [], "blocks": [], "sizes": []}
    real = checkpoint.open_safetensors
    monkeypatch.setattr(checkpoint, "open_safetensors", lambda *given, **named: Spy(real(*given, **named), notes))
    monkeypatch.setattr(checkpoint, "BLOCK", 300)
    take(base, tuned, tmp_path / "expert", rank=3)
    assert max(notes["sizes"]) <= 300
    assert max(notes["alive"]) <= 3  # one of each checkpoint, and the one of before that the next replaces
    parameters = sum(weight.numel() for weight in tiny_llama().parameters())
    assert sum(notes["sizes"]) <= 4 * parameters  # measured once, then differences once
    for module, update in updates(tmp_path / "expert").items():
        change = changes[f"{module}.weight"].double()
        torch.testing.assert_close(update, change, rtol=0, atol=1e-5 * float(change.abs().max()))


def test_blocks_are_whole_rows(pair):
    assert block_rows((7,)) == BLOCK
    assert block_rows((10, BLOCK * 2)) == 1
    assert block_rows((10, BLOCK // 4)) == 4
    assert block_rows((3, 0)) == BLOCK
    read = read_checkpoint(pair[0])
    with read.open() as rows:
        assert torch.cat(list(rows("model.norm.weight"))).shape == (32,)


def layers(*sizes):
    return [Linear(f"m{number}", outputs, inputs, False) for number, (outputs, inputs) in enumerate(sizes)]


def test_the_need_is_the_largest_module_and_all_factors():
    found = plan(layers((512, 512), (2048, 1024)), Extraction(rank=8, dtype="float32"))
    factors = 2 * 4 * 8 * (512 + 512 + 2048 + 1024)
    delta = 4 * 2048 * 1024
    assert found.need == factors + delta + max(8 * 4 * BLOCK, exact_bytes(2048, 1024))
    assert found.methods == {"m0": "exact", "m1": "exact"}


def test_the_randomised_method_stands_in_where_the_exact_one_does_not_fit():
    modules = layers((512, 512), (2048, 1024))
    exact = plan(modules, Extraction(rank=8, method="exact")).need
    tight = plan(modules, Extraction(rank=8, max_memory=exact - 1))
    assert tight.methods == {"m0": "exact", "m1": "randomised"}
    assert tight.need < exact
    with pytest.raises(ExtractionError, match="let --method auto choose"):
        plan(modules, Extraction(rank=8, max_memory=exact - 1, method="exact"))
    with pytest.raises(ExtractionError, match=r"m1 .* for the randomised SVD(.|\n)*use a lower rank"):
        plan(modules, Extraction(rank=8, max_memory=tight.need - 1))


def test_the_randomised_method_takes_over_where_the_exact_one_takes_minutes():
    assert plan(layers((4096, 4096)), Extraction(rank=8)).methods == {"m0": "randomised"}
    assert plan(layers((50000, 2048)), Extraction(rank=8, max_memory=1 << 40)).methods == {"m0": "exact"}


def test_a_narrow_matrix_is_exact_whatever_its_length():
    assert exact_bytes(3000, 3) < randomised_bytes(3000, 3, 3)
    assert plan(layers((3000, 3)), Extraction(rank=8)).methods == {"m0": "exact"}


@pytest.mark.parametrize("method", ["exact", "randomised"])
def test_the_method_that_was_asked_for_is_used(pair, tmp_path, method):
    report = take(pair[0], pair[1], tmp_path / "expert", rank=3, method=method)
    assert {kept.method for kept in report.modules} == {method}
