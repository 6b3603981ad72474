"""SEQR's normalisation: the statistics, their texts, what is refused, and the scores of a composed model."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from calibrating import DOWN, RANKS, Q, ids_of, inputs_of, inputs_of_texts, routed_model
from typer.testing import CliRunner

from models import close, dense_deltas
from spectr import ExpertLibrary, Glider, SeqrNormalised, calibrate, compose
from spectr.cli.app import app
from spectr.errors import CompositionError, DataError, LibraryError
from spectr.library import Calibration, LibraryStore
from spectr.spectral import reference
from text_model import make_model, make_tokenizer, save_experts, save_model

OWN = {"bees": ["the film is good", "a good film of the sky"]}


def sizes_of(delta, rows):
    sizes = torch.stack([(delta @ x).norm() for x in rows])
    return float(sizes.mean()), float(sizes.std(correction=0))


@pytest.fixture(scope="module")
def owned(library):
    return library.with_calibration(calibrate(make_model(), library, make_tokenizer(), own=OWN, null=0))


def test_means_and_deviations_are_those_of_the_dense_updates(root, library):
    rows = inputs_of_texts(library, [Q, DOWN])
    for module in (Q, DOWN):
        for name in RANKS:
            norm = library.calibration.of(name, module).norm
            assert norm == pytest.approx(sizes_of(dense_deltas(root / name)[module], rows[module]), rel=1e-4)


def test_of_an_experts_own_texts(root, library, owned):
    rows = []
    for text in OWN["bees"]:
        rows += list(inputs_of(make_model(), [Q], ids_of(text))[Q][len(library.calibration.opening) :])
    known, before = owned.calibration, library.calibration
    assert known.of("bees", Q).norm == pytest.approx(sizes_of(dense_deltas(root / "bees")[Q], rows), rel=1e-4)
    assert known.norms["ants"] is before.norms["ants"]
    assert (known.rms, known.own, before.own) == (before.rms, {"bees": 2}, {})
    again = calibrate(make_model(), owned.without("cats"), make_tokenizer(), null=0)
    assert again.norms["bees"] == known.norms["bees"]
    assert again.own == {"bees": 2}


def test_scores_are_those_of_the_reference(root, library):
    model, _ = routed_model(library, SeqrNormalised(top_k=2))
    texts = inputs_of_texts(library, [Q])[Q]
    ids = ids_of("what is the film")
    x_TI = inputs_of(make_model(), [Q], ids)[Q]
    decision = model.get_submodule(Q).route(x_TI.float())
    for t, x in enumerate(x_TI):
        deltas = [dense_deltas(root / name)[Q] for name in RANKS]
        scores = [reference.normalised_score(delta, x, texts) for delta in deltas]
        close(decision.scores_TE[t].double(), torch.tensor(scores, dtype=torch.float64), 1e-3)
        close(decision.weights_TE[t], torch.tensor(reference.uniform_weights(scores, 2)))


def test_statistics_are_saved_and_loaded(owned, tmp_path):
    owned.calibration.save(tmp_path)
    loaded = Calibration.load(tmp_path)
    for name in RANKS:
        for module, norm in owned.calibration.norms[name].items():
            assert loaded.norms[name][module] == pytest.approx(norm)
    assert loaded.own == {"bees": 2}


def test_a_calibration_of_an_older_version_is_refused_and_completed(library, owned):
    old = library.with_calibration(replace(library.calibration, norms={}))
    for router in (SeqrNormalised(), Glider(token_router=SeqrNormalised())):
        with pytest.raises(CompositionError, match="older version, without means and deviations of scores: ants, bees"):
            compose(make_model(), old.with_descriptions(dict.fromkeys(RANKS, "words")), router)
    whole = calibrate(make_model(), old, make_tokenizer(), null=0)
    for name in RANKS:
        assert whole.rms[name] is library.calibration.rms[name]
        assert whole.norms[name] == library.calibration.norms[name]
    with pytest.raises(CompositionError, match="not calibrated: ants, bees, cats"):
        compose(
            make_model(), ExpertLibrary.from_adapters({n: owned[n].weights.parent for n in RANKS}), SeqrNormalised()
        )


def test_statistics_of_two_kinds_of_texts_are_refused(owned):
    with pytest.raises(CompositionError, match="base model's texts for ants, cats, and of their own"):
        compose(make_model(), owned, SeqrNormalised())
    compose(make_model(), owned.without("ants").without("cats"), SeqrNormalised()).remove()


def test_an_expert_without_effect_comes_last(library):
    known = library.calibration
    still = {name: {**norms, Q: (0.0, 0.0)} if name == "bees" else norms for name, norms in known.norms.items()}
    model, _ = routed_model(library.with_calibration(replace(known, norms=still)), SeqrNormalised())
    x_TI = inputs_of(make_model(), [Q], ids_of("what is the film"))[Q]
    bees = list(RANKS).index("bees")
    scores_TE = model.get_submodule(Q).route(x_TI.float()).scores_TE
    assert (scores_TE.argmin(-1) == bees).all()
    assert scores_TE.min(-1).values.max() < -1000


def test_wrong_texts_are_refused(library):
    with pytest.raises(DataError, match=r"own\['bees'\] is empty"):
        calibrate(make_model(), library, make_tokenizer(), own={"bees": [" "]})
    with pytest.raises(LibraryError, match="dogs"):
        calibrate(make_model(), library, make_tokenizer(), own={"dogs": ["what"]})


def test_the_command_reads_each_experts_training_rows(tmp_path):
    save_experts(tmp_path / "plain", ("sst2", "cola"))
    for name in ("sst2", "cola"):
        LibraryStore(tmp_path / "experts").add(name, tmp_path / "plain" / name)
        (tmp_path / "data" / name).mkdir(parents=True)
        rows = [{"sentence": text, "label": 0} for text in ("what is it", "the film", "a good film")]
        (tmp_path / "data" / name / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = ["library", "calibrate", "-l", tmp_path / "experts", "-m", save_model(tmp_path / "model")]
    command += ["--samples", 2, "--tokens", 4, "--null", 0]
    rows = ["--own-rows", 2, "--data-root", tmp_path / "data"]
    for more, own in (((), {}), (rows, {"sst2": 2, "cola": 2})):  # again, although all experts are calibrated
        found = CliRunner().invoke(app, list(map(str, [*command, *more])))
        assert "calibrated 2 experts" in found.output, found.exception
        assert Calibration.load(tmp_path / "experts").own == own
