"""``spectr serve --engine vllm`` as a user starts it."""

import os
import re
import signal
import subprocess
import sys
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from engine import VOCABULARY

from text_model import make_tokenizer

OPTIONS = ("--max-model-len", "256", "--max-num-seqs", "8", "--enforce-eager")


class Server(NamedTuple):
    """Its address, ``None`` where it has ended; what it said until then; and the process."""

    address: str | None
    said: str
    process: subprocess.Popen


@contextmanager
def server(world, *words, options=OPTIONS):
    """A server of a tiny model."""
    save_tokenizer(world / "model")
    given = ("--engine", "vllm", "-m", world / "model", "-l", world / "library", "--port", "0", *words)
    command = [sys.executable, "-m", "spectr", "serve", *map(str, given), "--", *options]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env, start_new_session=True)
    try:
        yield _when_it_serves(process)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its engine's processes too, which outlive it where it is killed
        process.communicate()


def engine_of(process):
    """The engine's process and its workers."""
    [core] = _children(process.pid)
    return [core, *_children(core)]


def _children(parent):
    """Those that the engine has named as its own."""
    found = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return [int(child) for child in found if Path(f"/proc/{child}/cmdline").read_bytes().startswith(b"VLLM::")]


def left_of(processes):
    """Those that have not ended; not those that nobody has waited for."""
    return [process for process in processes if not _has_ended(process)]


def _has_ended(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2].startswith("Z")
    except (FileNotFoundError, ProcessLookupError):
        return True


def save_tokenizer(folder):
    """With a word for each of the model's ids, so that texts differ as ids do."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([f"w{number}" for number in range(len(tokenizer), VOCABULARY)])
    tokenizer.save_pretrained(folder)


def _when_it_serves(process):
    said = ""
    for line in process.stderr:
        said += line
        if found := re.search(r"at (http://\S+)/v1", line):
            return Server(found[1], said, process)
    process.wait()
    return Server(None, said, process)
