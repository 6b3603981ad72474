"""Three experts of unequal ranks, calibrated and indexed, for the tiny chat model; a command that serves; a gateway."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys

import httpx
import pytest

from forked import Forked
from inner import Inner
from models import peft_library
from serving import StandIn
from spectr import ExpertLibrary, build_index, calibrate
from spectr.serving.gateway import Gateway
from text_model import make_model, make_tokenizer

RANKS = {"ants": 4, "bees": 2, "cats": 8}
TEXTS = ["what is the sky", "the film is good", "who is it", "red blue green of the grass"]


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    root = tmp_path_factory.mktemp("served")
    peft_library(make_model(), root, RANKS)
    plain = ExpertLibrary.open(root)
    known = plain.with_calibration(calibrate(make_model(), plain, make_tokenizer(), texts=TEXTS, null=0))
    return build_index(make_model(), known)


@pytest.fixture
def start(given):
    """Start the command in a process of its own; gives its address, once it listens, what it said, and the process.

    With ``anew`` as a shell starts it, and else forked, without the 12 s of its imports.
    """
    started = []

    def call(*words, anew=False):
        command = ["serve", *map(str, given), "--port", "0", *map(str, words)]
        if anew:
            python = [sys.executable, "-m", "spectr"]
            process = subprocess.Popen([*python, *command], stderr=subprocess.PIPE, text=True)
        else:
            process = Forked(*command)
        started.append(process)
        said = ""
        assert process.stderr is not None
        for line in process.stderr:
            said += line
            if found := re.search(r"at (http://\S+)/v1", line):
                return found[1], said, process
        raise AssertionError(said)

    yield call
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def inner():
    return Inner()


@pytest.fixture
def engine():
    return StandIn()


@pytest.fixture
def ask(inner, engine):
    def call(method, path, key=None, policy=None, **given):
        gateway = Gateway(inner, engine, policy=policy, max_body=5000)
        call.gateway = gateway

        async def go():
            transport = httpx.ASGITransport(gateway)
            async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
                headers = {"authorization": f"Bearer {key}"} if key else {}
                return await client.request(method, path, headers=headers, **given)

        return asyncio.run(go())

    return call
