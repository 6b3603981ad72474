"""Which way computes a layer: what is fastest here, or what the user says. All ways choose the same experts."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import example, given, settings, strategies as st
from torch.utils.flop_counter import FlopCounterMode

from compiled import needs_a_compiler
from spectr.errors import SpectrError
from spectr.ops import Selector, backend_for, make_kernel_plan, reference_ops, timing
from spectr.ops.timing import Clock, LoadWatch, time_in_turn
from spectr.ops.trials import Trials, measure
from spectr.ops.way_times import TimedShapes
from spectr.ops.ways import TOKENS, TORCH, WAYS, Shape, as_wanted, described, fastest, place_of, wanted

SHAPE = Shape(torch.float32, 24, 20, 3, 9, 2)


class Hands:
    """A clock that goes on as it is described: by wall, and for how much of that this thread had a core."""

    def __init__(self, share=1.0):
        self.wall, self.used, self.share = 0.0, 0.0, share

    def pass_(self, seconds):
        self.wall += seconds
        self.used += seconds * self.share

    def takes(self, seconds):
        return lambda: self.pass_(seconds) or True

    @property
    def clock(self):
        return Clock(lambda: self.wall, lambda: self.used)


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """Nothing is forced, and nothing is known yet."""
    monkeypatch.setenv("SPECTR_CACHE", str(tmp_path))
    monkeypatch.delenv("SPECTR_KERNELS")
    return tmp_path / "kernels"


# What is wanted


@pytest.mark.parametrize("text", ["rowz", "rows:x", "rows:-1", "rows,,lanes"])
def test_a_way_that_is_none_is_refused(monkeypatch, text):
    monkeypatch.setenv("SPECTR_KERNELS", text)
    backend_for.cache_clear()
    try:
        with pytest.raises(SpectrError, match="SPECTR_KERNELS=") as error:
            backend_for("cpu")
    finally:
        backend_for.cache_clear()
    assert "torch+sums" in str(error.value)


@pytest.mark.parametrize("text", ["", "1"])
def test_nothing_is_wanted(monkeypatch, text):
    monkeypatch.setenv("SPECTR_KERNELS", text)
    assert wanted() == ()


def test_rules_serve_in_their_order(monkeypatch):
    monkeypatch.setenv("SPECTR_KERNELS", "tiles, rows:16,torch+sums:64")
    assert as_wanted(wanted(), ["rows", "torch+sums"]) == ("rows", "rows", "rows", "torch+sums", TORCH)
    assert as_wanted(wanted(), ["rows", "tiles"]) == ("tiles",) * 5


def test_every_number_of_tokens_goes_by_the_nearest_that_is_timed():
    assert [place_of(tokens) for tokens in TOKENS] == list(range(len(TOKENS)))
    assert [place_of(tokens) for tokens in (2, 7, 8, 31, 32, 127, 128, 100_000)] == [1, 1, 2, 2, 3, 3, 4, 4]


def test_a_table_can_be_read():
    assert described(("rows", "rows", "lanes", TORCH, TORCH)) == "rows for 1 4, lanes for 16, torch for 64 256 tokens"


# Timing


def test_the_fastest_way_is_found_and_a_hopeless_one_is_timed_once():
    hands, calls = Hands(), []
    ways = {
        "slow": lambda: calls.append("slow") or hands.takes(9)(),
        "fast": hands.takes(2),
        "near": hands.takes(3),
        "broken": lambda: None,
    }
    assert time_in_turn(ways, 1000, hands.clock) == {"slow": 9, "fast": 2, "near": 3}
    assert len(calls) == 2
    assert hands.wall == 2 * (9 + 2 + 3) + 6 * (2 + 3)
    assert fastest([{"fast": 2, "near": 3, "torch+sums": 4}, {}], lambda way: way != "fast") == ("near", TORCH)


def test_timing_ends_when_its_time_is_over():
    hands = Hands()
    assert time_in_turn({"one": hands.takes(1), "two": hands.takes(2)}, 7, hands.clock) == {"one": 1, "two": 2}
    assert hands.wall == 9


@pytest.mark.parametrize(("share", "loaded"), [(1.0, False), (0.95, False), (0.8, True), (0.4, True)])
def test_a_thread_that_waits_for_a_core_has_competition(share, loaded):
    hands = Hands(share)
    with LoadWatch(hands.clock) as watch:
        hands.pass_(2)
    assert watch.loaded is loaded


# What is kept


class Measure:
    """Counts what is measured, and how long that takes."""

    def __init__(self, hands, seconds=0.2):
        self.hands, self.seconds, self.shapes = hands, seconds, []

    def __call__(self, shape, seconds, alone):
        self.shapes.append((shape, alone) if alone else shape)
        self.hands.pass_(self.seconds)
        return [{"rows": 1.0, TORCH: 2.0}] * len(TOKENS)


def timed_shapes(path, share=1.0, seconds=0.2):
    hands = Hands(share)
    counts = Measure(hands, seconds)
    return TimedShapes(path / "times.json", counts, hands.clock), counts


def test_a_shape_is_timed_once_and_kept_for_other_processes(tmp_path):
    first, counts = timed_shapes(tmp_path)
    assert first.of(SHAPE).origin == "timed now"
    assert first.of(SHAPE).seconds[0] == {"rows": 1.0, TORCH: 2.0}
    second, none = timed_shapes(tmp_path)
    assert second.of(SHAPE) == first.of(SHAPE)._replace(origin="timed before")
    assert (len(counts.shapes), none.shapes) == (1, [])


def test_two_processes_keep_the_shapes_of_both(tmp_path):
    one, other = timed_shapes(tmp_path)[0], timed_shapes(tmp_path)[0]
    shapes = SHAPE, SHAPE._replace(outputs=99)
    one.of(shapes[0])
    other.of(shapes[1])
    third, counts = timed_shapes(tmp_path)
    assert {third.of(shape).origin for shape in shapes} == {"timed before"}
    assert not counts.shapes


def test_times_during_other_work_are_used_and_not_kept(tmp_path):
    busy, counts = timed_shapes(tmp_path, share=0.5)
    assert busy.of(SHAPE).origin == "by one thread, while other work ran, not kept"
    assert busy.of(SHAPE).seconds[0]["rows"] == 1.0
    assert counts.shapes == [SHAPE, (SHAPE, True)]
    assert timed_shapes(tmp_path)[0].of(SHAPE).origin == "timed now"


@pytest.mark.parametrize("content", ["", "{", '["rows"]', '{"a": [1]}'])
def test_a_file_that_cannot_be_read_is_made_anew(tmp_path, content):
    (tmp_path / "times.json").write_text(content)
    assert timed_shapes(tmp_path)[0].of(SHAPE).origin == "timed now"
    assert list(json.loads((tmp_path / "times.json").read_text())) == [SHAPE.key]


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path):
    (tmp_path / "file").touch()
    assert timed_shapes(tmp_path / "file")[0].of(SHAPE).origin == "timed now"


def test_when_the_time_is_over_the_most_similar_shape_counts(tmp_path):
    known, counts = timed_shapes(tmp_path, seconds=0.6)
    larger, fixed = SHAPE._replace(outputs=1000), SHAPE._replace(k=0)
    known.of(SHAPE)
    known.of(larger)
    assert known.of(SHAPE._replace(outputs=900)).origin == f"as for {larger.key}"
    assert known.of(fixed).origin == "timed now", "a first one of its kind is always timed"
    assert counts.shapes == [SHAPE, larger, fixed]


def test_similar_numbers_of_experts_share_their_times():
    assert SHAPE.key == SHAPE._replace(experts=11).key
    assert SHAPE.key != SHAPE._replace(experts=16).key
    assert len({SHAPE._replace(experts=experts).key for experts in range(1, 5)}) == 4


# On this machine


@needs_a_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k", [2, 0])
def test_all_ways_are_timed(dtype, k):
    shape = SHAPE._replace(dtype=dtype, k=k)
    ways = backend_for("cpu").backend.ways(dtype, k > 0)
    with torch.no_grad():
        found = measure(ways, shape, 60)
    assert [set(times) for times in found] == [{*ways, TORCH}] * len(TOKENS)
    assert all(seconds > 0 for times in found for seconds in times.values())


@needs_a_compiler
def test_one_thread_is_timed_alone_and_all_of_them_work_afterwards():
    trials, threads = Trials(backend_for("cpu").backend, "test"), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = trials._measure(SHAPE, 60, alone=True)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert "rows" in found[0]


@needs_a_compiler
def test_what_would_take_too_long_is_left_to_torchs_product():
    with torch.no_grad():
        found = measure(backend_for("cpu").backend.ways(torch.float32, True), SHAPE, 0)
    assert "rows" in found[0]
    assert all("+" in way or way == TORCH for times in found[1:] for way in times)


@needs_a_compiler
def test_a_plan_is_timed_once_for_all_layers_of_a_shape_and_all_processes(measured, monkeypatch):
    monkeypatch.setattr(timing, "_IDLE", 0)  # whoever else is at work on this machine
    backend, reasons = backend_for("cpu").backend, []
    for _ in range(2):
        monkeypatch.setattr(backend, "_trials", Trials(backend, "test"))
        for _ in range(2):
            A, B = torch.randn(27, 24), torch.randn(27, 20).mT
            reasons.append(make_kernel_plan(torch.nn.Linear(24, 20), A, B, None, Selector(9, 2, 0.0)).reason)
        [file] = measured.glob("times-*.json")
        assert list(json.loads(file.read_text())) == [SHAPE.key]
    assert [reason.rpartition("(")[2] for reason in reasons] == ["timed now)"] * 2 + ["timed before)"] * 2
    assert all("with the base layer; 24 to 20, " in reason for reason in reasons)


@needs_a_compiler
def test_nothing_is_timed_where_operations_are_counted(measured, monkeypatch):
    backend = backend_for("cpu").backend
    monkeypatch.setattr(backend, "_trials", Trials(backend, "test"))
    with FlopCounterMode(display=False):
        plan = make_kernel_plan(
            torch.nn.Linear(24, 20), torch.randn(27, 24), torch.randn(27, 20).mT, None, Selector(9, 2, 0.0)
        )
    assert "not timed" in plan.reason
    assert not measured.exists() or not list(measured.glob("times-*.json"))


@needs_a_compiler
@settings(max_examples=150, deadline=None)
@given(
    way=st.sampled_from(WAYS),
    experts=st.integers(1, 20),
    rank=st.integers(1, 9),
    k=st.integers(1, 6),
    inputs=st.sampled_from([5, 24, 37]),
    outputs=st.sampled_from([1, 20, 150]),
    tokens=st.sampled_from([1, 3, 8, 9, 16, 17, 33, 70, 300]),
    temperature=st.sampled_from([0.0, 2.0]),
    rows=st.sampled_from([0, 1, 2]),
    centers=st.booleans(),
    tied=st.booleans(),
    seed=st.integers(0, 10_000),
)
@example(
    way="torch+sums",
    experts=5,
    rank=1,
    k=1,
    inputs=5,
    outputs=1,
    tokens=1,
    temperature=0.0,
    rows=0,
    centers=False,
    tied=True,
    seed=3,
)
def test_all_ways_choose_the_same(
    way, experts, rank, k, inputs, outputs, tokens, temperature, rows, centers, tied, seed
):
    chance = torch.Generator().manual_seed(seed)
    x, A = torch.randn(tokens, inputs, generator=chance), torch.randn(experts * rank, inputs, generator=chance)
    if (
        tied
    ):  # of equal experts the first, in whole numbers: torch's products round the same row differently by its place
        x, A = x.round(), A[:rank].round().repeat(experts, 1)
    Bt, base = torch.randn(experts * rank, outputs, generator=chance), torch.nn.Linear(inputs, outputs)
    center = torch.randn(rank, generator=chance).repeat(experts) if centers else None
    prior = torch.rand(rows, experts, generator=chance) + 0.5 if rows and tokens % rows == 0 and not tied else None
    select = Selector(experts, min(k, experts), temperature)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setenv("SPECTR_KERNELS", way)
        backend = backend_for("cpu").backend
        patch.setattr(backend, "_trials", Trials(backend, "test"))
        if way not in backend.ways(torch.float32, True):
            return
        whole = backend.fused_linear(base, A, Bt, center, select)(x, prior)
        out = base(x)
        expected = reference_ops.add_update(out, x, A, Bt, center, prior, select)
        torch.testing.assert_close(whole, expected, rtol=1e-4, atol=1e-4)
        if way.startswith(TORCH):
            assert backend.add_chosen(x, A, Bt, center, prior, out, select)
            torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
