"""Measuring costs: synthetic experts, models in turn, and the command."""

from __future__ import annotations

import json

import pytest
import torch

from models import VOCAB, build, close, logits, peft_adapter, peft_library, peft_on_new_transformers, tiny_llama, tokens
from spectr import ExpertLibrary, Spectr, compose
from spectr.benchmark import Timing, benchmark, measure, write_lookalikes
from spectr.benchmark.comparison import explain
from spectr.benchmark.measure import Work, peak_bytes
from spectr.benchmark.subjects import BASE, BY_TORCH, OURS, Subject, by_torch, check_peers, get_peer, ours
from spectr.composition.multi_router import weight_sharing_copy
from spectr.errors import CompositionError, LibraryError
from spectr.flops import count_flops
from spectr.ops.compiling import find_compiler
from spectr.spectral import align
from text_model import make_model, save_experts, save_model

RANKS = {"ants": 4, "bees": 4}


@pytest.fixture
def library(tmp_path):
    return peft_library(tiny_llama(), tmp_path / "experts", RANKS)


def spectra(library, name):
    with library[name].open() as read:
        return {module: align(*read(module)).S for module in library[name].shapes}


def test_synthetic_experts_have_the_spectrum_of_a_real_one_times_one_number(library, tmp_path):
    whole = write_lookalikes(library, tmp_path / "made", 5)
    assert whole.names == ("ants", "bees", "synthetic-00001", "synthetic-00002", "synthetic-00003")
    real = [spectra(library, name) for name in library]
    for name in whole.names[2:]:
        made = spectra(whole, name)
        ratios = [torch.cat([made[m] / one[m] for m in made]) for one in real]
        assert min(float(r.std() / r.mean()) for r in ratios) < 1e-4
        with whole[name].open() as read, library["ants"].open() as other:
            module = next(iter(made))
            assert not torch.allclose(read(module).A, other(module).A)


def test_synthetic_experts_are_made_once_and_are_the_same_again(library, tmp_path):
    first = write_lookalikes(library, tmp_path / "made", 4)
    stamp = first["synthetic-00001"].weights.stat().st_mtime_ns
    again = write_lookalikes(library, tmp_path / "made", 5)
    assert again["synthetic-00001"].weights.stat().st_mtime_ns == stamp
    elsewhere = write_lookalikes(library, tmp_path / "other", 4)
    for name in ("synthetic-00001", "synthetic-00002"):
        assert first[name].weights.read_bytes() == elsewhere[name].weights.read_bytes()


def test_a_recurrent_model_is_measured(tmp_path):
    """Its state is no ``past_key_values``, and it takes no mask of what came before."""
    from transformers import MambaConfig, MambaForCausalLM

    model = build(MambaForCausalLM, MambaConfig(hidden_size=32, num_hidden_layers=1, vocab_size=VOCAB, state_size=4))
    library = peft_library(model, tmp_path / "experts", RANKS, targets=["in_proj", "x_proj"])
    outcome = benchmark(model, library, Spectr(top_k=1), peers=(), prompt=4, steps=2, rounds=1)
    assert {row[0] for row in outcome.rows if row[0]} == {
        "prompt of 4, batch 1",
        "decoding, batch 1",
        "decoding, batch 16",
    }


def test_fewer_experts_than_are_real_are_refused(library, tmp_path):
    with pytest.raises(LibraryError, match="1 experts, but the library alone has 2"):
        write_lookalikes(library, tmp_path, 1)


def test_a_weight_sharing_copy_shares_only_weights():
    model = tiny_llama()
    other = weight_sharing_copy(model)
    pairs = list(zip(model.parameters(), other.parameters(), strict=True))
    assert all(mine.data_ptr() == theirs.data_ptr() for mine, theirs in pairs)
    other.requires_grad_(False)
    assert all(mine.requires_grad and not theirs.requires_grad for mine, theirs in pairs)
    assert not set(map(id, model.modules())) & set(map(id, other.modules()))


def test_subjects_compute_what_they_are_named_for(library):
    model = tiny_llama()
    plain = logits(model, tokens())
    with peft_on_new_transformers():
        single = get_peer("peft-single")(model, library, 1).model
    routed = ours(model, library, Spectr(top_k=1)).model
    other = tiny_llama()
    compose(other, library, Spectr(top_k=1))
    close(logits(routed, tokens()), logits(other, tokens()))
    assert not torch.allclose(logits(single, tokens()), plain, atol=1e-4)
    assert torch.equal(logits(model, tokens()), plain)


def test_the_routed_model_is_measured_without_kernels_too(library):
    model = tiny_llama()
    outcome = benchmark(model, library, Spectr(top_k=1), peers=(), prompt=4, batches=(), rounds=1, torch_alone=True)
    assert set(outcome.timings) == {f"{name} | prompt of 4, batch 1" for name in (BASE, OURS, BY_TORCH)}
    [line] = explain(by_torch(model, library, Spectr(top_k=1)).model)
    assert line.endswith("layers: torch: without kernels")
    assert "without kernels" not in "".join(explain(ours(model, library, Spectr(top_k=1)).model))


def test_an_unknown_peer_is_named():
    with pytest.raises(CompositionError, match="unknown peer 'peft-singel'"):
        get_peer("peft-singel")


def test_a_ratio_is_the_median_of_the_ratios_within_rounds():
    slow, fast = Timing(seconds=(2.0, 9.0, 4.0), peak=0), Timing(seconds=(1.0, 3.0, 4.0), peak=0)
    assert slow.over(fast) == 2.0
    assert slow.median == 4.0


def test_every_model_is_timed_at_every_work_in_turn(library):
    model, order = tiny_llama(), []
    works = [Work(prompt=5), Work(prompt=4, batch=2, steps=3)]
    subjects = [Subject(name="one", model=model), Subject(name="two", model=weight_sharing_copy(model))]
    found = measure(subjects, works, rounds=3, progress=lambda done, total, what: order.append((done, total, what)))
    assert set(found) == {(name, work.name) for name in ("one", "two") for work in works}
    assert all(len(timing.seconds) == 3 and min(timing.seconds) > 0 and timing.peak > 0 for timing in found.values())
    assert [done for done, _, _ in order] == list(range(1, 21))
    assert [what.split(",")[0] for _, _, what in order[-4:]] == ["one", "one", "two", "two"]
    assert [what.split(",")[0] for _, _, what in order[-8:-4]] == ["two", "two", "one", "one"]


class Growing(torch.nn.Module):
    """Holds two matrices of ``size`` numbers at once, never three."""

    def __init__(self, size):
        super().__init__()
        self.size, self.weight = size, torch.nn.Parameter(torch.zeros(1))
        self.config = tiny_llama().config

    def forward(self, input_ids, **_):
        """Make two, drop one, make another."""
        first = torch.ones(self.size)
        second = first + 1
        del first
        return second * 2


@torch.inference_mode()
def test_the_peak_is_what_is_held_at_once():
    assert peak_bytes(Growing(1 << 20), Work(prompt=1)) == pytest.approx(8 << 20, rel=0.01)


def test_gathered_sums_and_products_in_place_are_counted():
    bag, weights = torch.zeros(4, 8, dtype=torch.long), torch.randn(20, 5)
    with torch.inference_mode():
        found = count_flops(
            lambda: torch.nn.functional.embedding_bag(bag, weights, per_sample_weights=torch.ones(4, 8), mode="sum")
        )
        assert found == 2 * 4 * 8 * 5
        assert count_flops(lambda: torch.zeros(3, 5).addmm_(torch.ones(3, 7), torch.ones(7, 5))) == 2 * 3 * 7 * 5


def test_the_limit_counts_what_is_added(library, tmp_path):
    whole = write_lookalikes(library, tmp_path / "made", 8)
    model = tiny_llama()
    outcome = benchmark(model, whole, Spectr(top_k=1), peers=(), prompt=6, batches=(1,), steps=2, rounds=1)
    parameters = sum(p.numel() for p in model.parameters())
    layers = {name: layer for name, layer in model.named_modules() if name in whole["ants"].shapes}
    inputs, outputs = (sum(getattr(m, f"{kind}_features") for m in layers.values()) for kind in ("in", "out"))
    added = 8 * 4 * inputs + 4 * outputs  # all are scored, one is summed
    assert outcome.limits["decoding, batch 1"] == pytest.approx(1 + added / parameters)
    assert outcome.limits["prompt of 6, batch 1"] > 1
    assert [row[1] for row in outcome.rows] == [BASE, OURS] * 2
    assert outcome.origin["experts"] == 8


# The command


@pytest.fixture
def folders(tmp_path):
    return ("--model", save_model(tmp_path / "model"), "--library", save_experts(tmp_path / "experts", ("a", "b")))


def test_the_command_prints_a_table_and_writes_all_numbers(spectr, folders, tmp_path):
    quick = ("--prompt", 8, "--batch", "1,2", "--steps", 2, "--rounds", 2, "--dtype", "float32", "-r", "spectr")
    code, text, _ = spectr(
        "benchmark", *folders, *quick, "--experts", 4, "--against", "none", "--explain", "-o", tmp_path / "x.json"
    )
    assert code == 0
    assert f"layers: {'C for cpu: top 2 of 4 by lengths' if find_compiler() else 'torch: there is no C'}" in text
    assert "4 experts, Spectr(" in text
    assert "decoding, batch 2" in text
    saved = json.loads((tmp_path / "x.json").read_text())
    assert len(saved["timings"]["spectr | decoding, batch 1"]["seconds"]) == 2


@pytest.mark.parametrize("router", [(), ("-r", "calibrated-prior"), ("-r", "shortlist", "--set", "size=2")])
def test_routers_that_decide_on_prompts_are_timed_at_any_batch(spectr, folders, router):
    assert spectr("library", "calibrate", *folders, "--samples", 2, "--tokens", 4)[0] == 0
    assert spectr("library", "index", *folders)[0] == 0
    quick = ("--prompt", 8, "--batch", "3,1", "--steps", 2, "--rounds", 1, "--dtype", "float32", "--against", "none")
    code, text, _ = spectr("benchmark", *folders, *quick, *router)
    assert code == 0
    assert "decoding, batch 3" in text
    assert "Calibrated(" in text
    assert spectr("benchmark", *folders, *quick, *router, "--experts", 2)[0] == 0
    code, _, said = spectr("benchmark", *folders, *quick, *router, "--experts", 3)
    assert code == 2
    assert "synthetic experts have no calibration" in said
    assert "loading" not in said


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--against", "vllm"), "unknown peer 'vllm'"),
        (("--batch", "1,x"), "numbers of at least 1"),
        (("--batch", "0"), "numbers of at least 1"),
        (("-o", "x.txt"), "does not end in .json"),
        (("--experts", 1, "-r", "spectr"), "the library alone has 2"),
        (("--allow", "a", "-r", "spectr"), "use a library that holds only these experts"),
        (("--prompt", 9000, "-r", "spectr"), "tokens in all, the model's context"),
    ],
)
def test_what_cannot_be_measured_is_refused(spectr, folders, given, message):
    code, _, said = spectr("benchmark", *folders, *given)
    assert code == 2
    assert message in said
    assert "loading" not in said or given[0] == "--prompt"  # whose limit is in the model's configuration


def test_experts_that_peft_arrow_cannot_hold(spectr, folders, tmp_path):
    peft_adapter(make_model(), tmp_path / "experts" / "c", 3, rank=2)
    quick = ("--prompt", 4, "--batch", 1, "--steps", 1, "--rounds", 1, "--dtype", "float32", "-r", "spectr")
    code, _, said = spectr("benchmark", *folders, *quick, "--against", "peft-single,peft-arrow")
    assert code == 2
    assert "Arrow cannot hold these experts" in said
    assert "--against peft-single" in said
    assert "loading" not in said
    with peft_on_new_transformers():
        code, text, said = spectr("benchmark", *folders, *quick)
    assert code == 0
    assert "Arrow is not measured" in " ".join(said.split())
    assert "one adapter" in text
    assert "Arrow" not in text


def test_experts_of_other_scales_are_for_peft_arrow_too(library, tmp_path):
    whole = write_lookalikes(library, tmp_path / "made", 4)
    scales = {shape.scale for name in whole for shape in whole[name].shapes.values()}
    assert len(scales) > 1
    check_peers(["peft-arrow"], whole)


def test_synthetic_experts_have_no_calibration(spectr):
    code, _, said = spectr("benchmark", "--experts", 20)
    assert code == 2
    assert "synthetic experts have no calibration" in said


def test_opened_libraries_keep_what_was_made(library, tmp_path):
    whole = write_lookalikes(library, tmp_path / "made", 3)
    assert isinstance(whole, ExpertLibrary)
    assert whole["ants"].weights == library["ants"].weights
