"""``python -m spectr`` without its imports: each command line is a process forked from one that has made them."""

from __future__ import annotations

import multiprocessing
import os
import sys
from multiprocessing.connection import Connection

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "aiohttp",
        "openai.resources",
        "openai.types",
        "peft",
        "spectr.cli.app",
        "spectr.serving.engines.transformers",
        "spectr.serving.run",
        "transformers.cli.serving.chat_completion",
        "transformers.models.llama.modeling_llama",
        "uvicorn",
    ]
)


def _run(words: list[str], environment: dict[str, str], errors: Connection) -> None:
    from spectr.cli import main

    os.environ.clear()
    os.environ.update(environment)
    os.dup2(errors.fileno(), 2)
    errors.close()
    sys.argv = ["spectr", *words]
    main()


class Forked:
    """A command line that runs, with what tests use of ``subprocess.Popen``."""

    def __init__(self, *words: str):
        read, write = FORKS.Pipe(duplex=False)
        self._process = FORKS.Process(target=_run, args=(words, dict(os.environ), write))
        self._process.start()
        write.close()
        self.stderr = os.fdopen(os.dup(read.fileno()), encoding="utf-8")
        read.close()

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self._process.pid, number)

    def kill(self) -> None:
        self._process.kill()

    def wait(self, timeout: float | None = None) -> int | None:
        self._process.join(timeout)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[None, str]:
        said = "" if self.stderr.closed else self.stderr.read()
        self.wait(timeout)
        self.stderr.close()
        return None, said
