"""Adapters that cannot be routed exactly, or cannot be read, are refused by name and say what to do."""

import os
import pickle

import pytest
import torch
from peft import IA3Config, LoraConfig
from safetensors.torch import save_file

from adapters_on_disk import assert_says, factors, key_A, key_B, save_with_peft, tiny_llama, write_adapter
from spectr.adapters import read_adapter
from spectr.errors import AdapterError, LibraryError, SpectrError, did_you_mean, raise_together
from spectr.library import ExpertLibrary

PLAIN_LORA = "a plain LoRA adapter, whose update is scale * B @ A"
PAIRS = "pairs of 2-D factors A (r, in) and B (out, r) of linear layers"
Q = "model.layers.0.self_attn.q_proj"


def refusal(folder, name="sql", **options) -> AdapterError:
    with pytest.raises(AdapterError) as caught:
        read_adapter(folder, name, **options)
    return caught.value


WRITTEN_BY_PEFT = {
    "replicated layers": (
        LoraConfig(target_modules=["q_proj"], layer_replication=[(0, 2), (1, 2)]),
        "layer_replication is set (it duplicates layers",
    ),
    "IA3": (IA3Config(target_modules=["q_proj"], feedforward_modules=[]), "peft_type is 'IA3', not 'LORA'"),
}


@pytest.mark.parametrize(("config", "reason"), WRITTEN_BY_PEFT.values(), ids=WRITTEN_BY_PEFT.keys())
def test_what_is_not_plain_lora_is_refused_by_name(tmp_path, config, reason):
    error = refusal(save_with_peft(tmp_path, tiny_llama(), config))
    assert_says(error, given=("expert 'sql' cannot be routed exactly", reason), expected=PLAIN_LORA, do="retrain it")


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("use_qalora", True),
        ("alora_invocation_tokens", [3]),
        ("use_bdlora", {"nblocks": 2}),
        ("arrow_config", {"top_k": 3}),
        ("megatron_config", {"tp": 2}),
        ("setting_of_next_year", True),
    ],
)
def test_settings_of_other_methods_are_refused_by_name(tmp_path, setting, value):
    error = refusal(write_adapter(tmp_path, **{setting: value}))
    assert_says(error, given=("expert 'sql'", f"{setting} is set"), expected=PLAIN_LORA, do="retrain it as plain LoRA")


@pytest.mark.parametrize(
    "setting", ["use_dora", "lora_bias", "target_parameters", "setting_of_next_year", "rank_pattern"]
)
@pytest.mark.parametrize("off", [None, False, [], {}])
def test_a_setting_that_is_off_is_no_reason(tmp_path, setting, off):
    assert len(read_adapter(write_adapter(tmp_path, **{setting: off}), "sql").shapes) == 2


@pytest.mark.parametrize(
    ("init", "folder"),
    [("pissa_niter_16", "pissa_init"), ("PISSA", "pissa_init"), ("corda", "corda_init"), ("lora_ga", "lora_ga_init")],
)
def test_initial_factors_that_cannot_be_made_again_are_asked_for(tmp_path, init, folder):
    error = refusal(write_adapter(tmp_path, init_lora_weights=init))
    given = ("init_lora_weights names", "cannot be recomputed", f"none in {folder}")
    assert_says(error, given=given, expected=PLAIN_LORA, do="path_initial_model_for_weight_conversion")


def test_a_base_that_was_quantised_for_the_adapter_is_refused(tmp_path):
    error = refusal(write_adapter(tmp_path, init_lora_weights="loftq"))
    reason = "init_lora_weights is 'loftq' (it also changes the base model's weights)"
    assert_says(error, given=(reason,), expected=PLAIN_LORA, do="retrain it")


def test_all_faults_of_a_configuration_are_named_at_once(tmp_path):
    error = refusal(write_adapter(tmp_path, use_qalora=True, bias="some", lora_alpha="x", strange=1))
    reasons = ("use_qalora is set", "bias is 'some'", "strange is set", "lora_alpha is 'x'")
    assert_says(error, given=reasons, expected=PLAIN_LORA, do="retrain it")


@pytest.mark.parametrize(
    ("setting", "value", "shown"),
    [
        ("r", "8", "r is '8'"),
        ("r", 0, "r is 0"),
        ("r", -1, "r is -1"),
        ("r", 2.5, "r is 2.5"),
        ("r", None, "r is None"),
        ("lora_alpha", "16", "lora_alpha is '16'"),
        ("lora_alpha", None, "lora_alpha is None"),
        ("lora_alpha", float("nan"), "lora_alpha is nan"),
        ("lora_alpha", float("inf"), "lora_alpha is inf"),
        ("peft_type", None, "peft_type is None, not 'LORA'"),
    ],
)
def test_a_wrong_number_is_shown(tmp_path, setting, value, shown):
    error = refusal(write_adapter(tmp_path, **{setting: value}))
    assert_says(error, given=("expert 'sql'", shown), expected=PLAIN_LORA, do="retrain it")


def test_no_code_of_pickled_weights_runs(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    folder = write_adapter(tmp_path / "a")
    (folder / "adapter_model.safetensors").unlink()
    for content in (*(pickle.dumps(one, protocol=2) for one in (Bomb(), {"a": 1}, [1])), b"not even a pickle", b""):
        (folder / "adapter_model.bin").write_bytes(content)
        given = ("expert 'sql'", str(folder / "adapter_model.bin"))
        assert_says(refusal(folder), given=given, expected="tensors by name", do="copy or download it again")
    assert not (tmp_path / "exploded").exists()


def test_a_pickle_next_to_safetensors_is_ignored(adapter):
    (adapter / "adapter_model.bin").write_bytes(b"not even a pickle")
    assert len(read_adapter(adapter, "sql").shapes) == 2


def test_no_weights(adapter):
    (adapter / "adapter_model.safetensors").unlink()
    assert_says(
        refusal(adapter),
        given=("expert 'sql'", f"{adapter} has no adapter_model.safetensors"),
        expected="the weights next to the configuration",
        do="copy or download the adapter again",
    )


@pytest.mark.parametrize("source", ["{tmp}/nowhere", "./nowhere", "../nowhere", "nowhere", "a b/c"])
def test_a_missing_folder(tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    source = source.format(tmp=tmp_path)
    assert_says(
        refusal(source),
        given=("expert 'sql'", f"there is no folder {source}"),
        expected="a folder with adapter_config.json, or a Hub id like org/repo",
        do="check the path",
    )


@pytest.mark.parametrize("source", ["no-such-org/no-such-repo", "no-such-org/no-such-repo/sub@v1"])
def test_a_hub_id_that_cannot_be_reached(source, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    shown = source.replace("/sub@v1", "/sub/")
    assert_says(
        refusal(source),
        given=("expert 'sql'", f"'{shown}' is not a folder", "LocalEntryNotFoundError"),
        expected="a Hub id that this machine can reach",
        do="check the name, the network, and whether the repository needs a login",
    )


def test_no_configuration(adapter):
    (adapter / "adapter_config.json").unlink()
    assert_says(
        refusal(adapter),
        given=("expert 'sql'", f"{adapter} has no adapter_config.json"),
        expected="a folder as PEFT's save_pretrained writes it",
        do="pass the folder of one adapter",
    )


@pytest.mark.parametrize("text", [b"", b"{'r': 8}", b'{"r": 8', b"[1, 2]", b"null", b"\xff\xfe{}"])
def test_a_configuration_that_is_not_a_json_object(adapter, text):
    (adapter / "adapter_config.json").write_bytes(text)
    given = ("expert 'sql'", f"{adapter / 'adapter_config.json'} is not a JSON object")
    assert_says(refusal(adapter), given=given, expected=None, do="save or download it again")


@pytest.mark.parametrize("kept", [0, 4, 8, 100, -1], ids=lambda kept: f"first {kept} bytes")
def test_a_truncated_file(adapter, kept):
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:kept])
    assert_says(
        refusal(adapter),
        given=("expert 'sql'", f"{weights} cannot be read as safetensors ("),
        expected="a complete safetensors file",
        do="download or copy it again",
    )


@pytest.mark.parametrize("garbage", [b"x" * 500, b"\0" * 500, b"<!DOCTYPE html><html>Not found</html>", b"version 1"])
def test_a_file_that_is_something_else(adapter, garbage):
    (adapter / "adapter_model.safetensors").write_bytes(garbage)
    given = ("expert 'sql'", "adapter_model.safetensors cannot be read as safetensors (")
    assert_says(refusal(adapter), given=given, expected="a complete safetensors file", do="download or copy it again")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("key", [key_A(Q), key_B(Q)])
def test_weights_that_are_not_finite(tmp_path, key, value):
    tensors = factors()
    tensors[key][-1, -1] = value
    folder = write_adapter(tmp_path / "a", tensors=tensors)
    says = {
        "given": (f"expert 'sql': {key} holds NaN or infinite values",),
        "expected": "finite weights",
        "do": "train or download the adapter again",
    }
    assert_says(refusal(folder), **says)
    expert = read_adapter(folder, "sql", check_values=False)
    with expert.open() as read, pytest.raises(AdapterError) as caught:
        read(Q)
    assert_says(caught.value, **says)
    with pytest.raises(AdapterError) as caught:
        list(expert.stacked([[Q]], None))
    assert_says(caught.value, **says)


def test_an_untrained_adapter(tmp_path):
    untrained = save_with_peft(tmp_path, tiny_llama(), LoraConfig(target_modules=["q_proj", "v_proj"]), trained=False)
    assert_says(
        refusal(untrained),
        given=("expert 'sql' changes nothing: the updates of all 4 modules are zero",),
        expected="a trained adapter",
        do="omit it, or save it again after training",
    )


@pytest.mark.parametrize("dead", ["A", "B", "scale"])
def test_an_update_of_zero_whichever_factor_is_zero(tmp_path, dead):
    tensors = {key: tensor * 0 if f"lora_{dead}." in key else tensor for key, tensor in factors().items()}
    folder = write_adapter(tmp_path, tensors=tensors, lora_alpha=0 if dead == "scale" else 4)
    given = ("expert 'sql' changes nothing: the updates of all 2 modules are zero",)
    assert_says(refusal(folder), given=given, expected="a trained adapter", do="omit it")


@pytest.mark.parametrize("config", [{"r": 4}, {"rank_pattern": {"q_proj": 4}}], ids=["r", "rank_pattern"])
def test_ranks_other_than_the_configuration_says(tmp_path, config):
    error = refusal(write_adapter(tmp_path, tensors=factors(rank=2), **config))
    reason = f"{Q} has factors of shapes (2, 8) and (8, 2) but the configuration says rank 4"
    assert_says(error, given=("expert 'sql'", reason), expected=PAIRS, do="retrain it as plain LoRA")


def test_factors_whose_ranks_differ(tmp_path):
    error = refusal(write_adapter(tmp_path, tensors={key_A(Q): torch.ones(2, 8), key_B(Q): torch.ones(8, 3)}))
    reason = f"{Q} has factors of shapes (2, 8) and (8, 3) but the configuration says rank 2"
    assert_says(error, given=("expert 'sql'", reason), expected=PAIRS, do="retrain it as plain LoRA")


ODD_TENSORS = {
    "a stranger": ({"lm_head.scale": (3, 3)}, "lm_head.scale is not a LoRA factor"),
    "a magnitude": (
        {f"{Q}.lora_magnitude_vector": (8,)},
        f"{Q}.lora_magnitude_vector is a DoRA magnitude, which the configuration",
    ),
    "a bias": ({f"{Q}.lora_B.bias": (8,)}, f"{Q}.lora_B.bias is a bias of the B matrix, which the"),
    "a trained bias": ({f"{Q}.base_layer.bias": (8,)}, f"{Q}.base_layer.bias is not a LoRA factor"),
    "a whole module": (
        {"base_model.model.lm_head.modules_to_save.weight": (3, 3)},
        "base_model.model.lm_head.modules_to_save.weight is a whole trained module",
    ),
    "half a pair": ({"m.lora_A.weight": (2, 8)}, "m has only one factor"),
    "a convolution": (
        {"conv.lora_A.weight": (2, 3, 3, 3), "conv.lora_B.weight": (8, 2, 1, 1)},
        "conv has factors of shapes (2, 3, 3, 3) and (8, 2, 1, 1) (a convolution?)",
    ),
}


@pytest.mark.parametrize(("extra", "reason"), ODD_TENSORS.values(), ids=ODD_TENSORS.keys())
def test_tensors_that_are_no_pair_of_factors(tmp_path, extra, reason):
    tensors = {**factors(), **{key: torch.ones(shape) for key, shape in extra.items()}}
    error = refusal(write_adapter(tmp_path, tensors=tensors))
    assert_says(error, given=("expert 'sql' cannot be routed exactly", reason), expected=PAIRS, do="on linear layers")


def test_of_many_odd_tensors_five_are_named_and_the_rest_counted(tmp_path):
    strangers = {f"stranger.{i}": torch.ones(1) for i in range(7)}
    error = refusal(write_adapter(tmp_path, tensors=strangers))
    assert [f"stranger.{i} is" in error.given for i in range(7)] == [True] * 5 + [False] * 2
    assert error.given.endswith("; and 2 more")


def test_a_file_without_tensors(adapter):
    save_file({}, adapter / "adapter_model.safetensors")
    assert_says(refusal(adapter), given=("it holds no LoRA factors",), expected=PAIRS, do="retrain it as plain LoRA")


def test_all_broken_adapters_are_reported_in_one_error(tmp_path, adapter):
    (tmp_path / "empty").mkdir()
    adapters = {
        "fine": adapter,
        "dora": write_adapter(tmp_path / "dora", use_qalora=True),
        "hollow": tmp_path / "empty",
        "lost": tmp_path / "nowhere",
    }
    with pytest.raises(SpectrError) as caught:
        ExpertLibrary.from_adapters(adapters)
    message = str(caught.value)
    assert message.startswith("the adapters cannot be used: 3 problems\n- expert 'dora'")
    for part in (
        "expert 'dora' cannot be routed exactly: use_qalora is set",
        f"expert 'hollow': {tmp_path / 'empty'} has no adapter_config.json",
        f"expert 'lost': there is no folder {tmp_path / 'nowhere'}",
        "to do: retrain it as plain LoRA",
        "to do: pass the folder of one adapter",
        "to do: check the path",
    ):
        assert part in message
    assert "'fine'" not in message


def test_a_single_broken_adapter_is_its_own_error(tmp_path, adapter):
    with pytest.raises(AdapterError) as caught:
        ExpertLibrary.from_adapters({"fine": adapter, "dora": write_adapter(tmp_path / "dora", use_qalora=True)})
    assert_says(caught.value, given=("expert 'dora'", "use_qalora is set"), expected=PLAIN_LORA, do="retrain it")


def test_no_adapters_at_all():
    with pytest.raises(LibraryError) as caught:
        ExpertLibrary.from_adapters({})
    assert_says(caught.value, given=("no adapters were given",), expected=None, do="name at least one")


def test_a_missing_extra_is_an_import_error_with_the_command():
    from spectr.errors import MissingExtraError

    error = MissingExtraError("drawing", "plots")
    assert isinstance(error, ImportError)
    given = ("drawing needs the extra 'plots', which is not installed",)
    assert_says(error, given=given, expected=None, do='pip install "spectr-lora[plots]"')


@pytest.mark.parametrize(
    ("name", "known", "phrase"),
    [
        ("slq", ["sql", "law"], "did you mean 'sql'? known: law, sql"),
        ("zzz", ["sql", "law"], "known: law, sql"),
        ("sql", [], "known: none"),
        ("r9", [f"q{i}" for i in range(40)], f"did you mean 'q9'? known: {', '.join(f'q{i}' for i in range(40))}"),
        ("zzz", [f"q{i}" for i in range(42)], f"known: {', '.join(f'q{i}' for i in range(40))} and 2 more"),
    ],
)
def test_did_you_mean(name, known, phrase):
    assert did_you_mean(name, known) == phrase


def test_errors_raised_together():
    raise_together("nothing", [])
    one, two = AdapterError("one", do="this"), AdapterError("two", expected="that")
    with pytest.raises(AdapterError) as caught:
        raise_together("title", [one])
    assert caught.value is one
    with pytest.raises(LibraryError) as both:
        raise_together("title", iter([one, two]), LibraryError)
    assert str(both.value) == "title: 2 problems\n- one\n  to do: this\n- two\n  expected: that"


def test_the_message_is_what_was_given_what_expected_and_what_to_do():
    assert str(SpectrError("a")) == "a"
    assert str(SpectrError("a", expected="b", do="c")) == "a\n  expected: b\n  to do: c"
    assert str(SpectrError("a", do="c")) == "a\n  to do: c"
    assert isinstance(SpectrError("a"), ValueError)
