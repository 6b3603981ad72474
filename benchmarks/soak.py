"""A server under mixed load and faults: no wrong set, no lost stream, the right status, no growing memory.

    $ python benchmarks/soak.py --requests 1000 -- --model MODEL --library EXPERTS --dtype float32 --batch
    $ python benchmarks/soak.py --requests 1000 --url http://127.0.0.1:8000 --key sk-... --pid 1234

What stands after ``--`` are options of ``spectr serve``, which is started, with either engine, and stopped again. With
``--url`` a server that runs already is asked. Every answer is compared with the same request's answer when it was asked
alone; in float32 they are equal (in bfloat16 batches round otherwise: ``--no-exact``).
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

WORDS = (
    "what",
    "is",
    "the",
    "sky",
    "like",
    "and",
    "why",
    "does",
    "film",
    "about",
    "red",
    "grass",
    "good",
    "blue",
    "end",
)
FAULTS = {
    "hang up in a stream": None,
    "hang up while waiting": None,
    "prompt over the context": 400,
    "malformed JSON": 400,
    "wrong type": 400,
    "unknown expert": 404,
    "unknown model": 404,
    "empty allow-list": 400,
    "unknown path": 404,
}


@dataclass
class Tally:
    """What happened."""

    good: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)
    tokens: int = 0
    seconds: list[float] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)


class Soak:
    """Requests and faults against one server.

    Args:
        client: Of that server, with the key.
        experts: What the key may use.
        exact: Whether texts have to be those of the request alone.
        seed: Of the mixture.
    """

    def __init__(self, client: httpx.AsyncClient, experts: list[str], exact: bool, seed: int):
        self.client, self.exact, self.random, self.tally = client, exact, random.Random(seed), Tally()
        sets = (
            [[name] for name in experts] + [list(pair) for pair in itertools.combinations(experts, 2)][:6] + [experts]
        )
        lengths = (4, 12, 40)
        self.asked = [
            {
                "model": "spectr",
                "temperature": 0,
                "max_tokens": self.random.choice((4, 8, 24)),
                "return_routing": True,
                "experts": names,
                "messages": [{"role": "user", "content": " ".join(self.random.choices(WORDS, k=length))}],
            }
            for names in sets
            for length in lengths
        ]
        self.expected: dict[str, str] = {}

    async def alone(self) -> None:
        """Every request once, by itself."""
        for body in self.asked:
            answer = await self.client.post("/v1/chat/completions", json=body)
            answer.raise_for_status()
            self.expected[json.dumps(body)] = answer.json()["choices"][0]["message"]["content"]

    async def one(self, number: int, faulty: bool) -> None:
        """One request, good or faulty."""
        body = self.random.choice(self.asked)
        try:
            if faulty:
                kind = list(FAULTS)[number % len(FAULTS)]
                self.tally.faults[kind] += 1
                await self._fault(kind, body)
            else:
                kind = "stream" if number % 2 else "whole"
                began = time.monotonic()
                await (self._stream(body) if number % 2 else self._whole(body))
                self.tally.seconds.append(time.monotonic() - began)
                self.tally.good[kind] += 1
        except (httpx.HTTPError, KeyError, ValueError, AssertionError) as error:
            self.tally.errors.append(f"{kind}: {type(error).__name__}: {error}")

    async def _whole(self, body: dict[str, Any]) -> None:
        answer = await self.client.post("/v1/chat/completions", json=body)
        assert answer.status_code == 200, f"status {answer.status_code}: {answer.text[:200]}"
        choice = answer.json()["choices"][0]
        self._check(body, choice["message"]["content"], [choice["routing"]])

    async def _stream(self, body: dict[str, Any]) -> None:
        text, routing, ended = "", [], False
        async with self.client.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as answer:
            assert answer.status_code == 200, f"status {answer.status_code}"
            async for line in answer.aiter_lines():
                if not line.startswith("data: "):
                    continue
                if line == "data: [DONE]":
                    ended = True
                    continue
                chunk = json.loads(line[6:])
                assert "error" not in chunk, f"error in a stream: {chunk['error']}"
                for choice in chunk["choices"]:
                    text += choice["delta"].get("content") or ""
                    routing.append(choice["routing"])
        assert ended, "a stream without its end"
        self._check(body, text, routing)

    def _check(self, body: dict[str, Any], text: str, routing: list[dict[str, Any]]) -> None:
        assert all(told["experts"] == sorted(body["experts"]) for told in routing), "a wrong set"
        self.tally.tokens += sum(len(told["tokens"]) for told in routing)
        if self.exact:
            expected = self.expected[json.dumps(body)]
            assert text == expected, f"another text than alone, with {body['experts']}: {text!r}, not {expected!r}"

    async def _fault(self, kind: str, body: dict[str, Any]) -> None:
        path, given = "/v1/chat/completions", dict(body)
        if kind == "hang up in a stream":
            async with self.client.stream("POST", path, json={**body, "stream": True}) as answer:
                await anext(answer.aiter_raw())
            return
        if kind == "hang up while waiting":
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self.client.post(path, json=body), 0.02)
            return
        content = None
        if kind == "prompt over the context":
            given["messages"] = [{"role": "user", "content": "the sky is " * 20_000}]
        elif kind == "malformed JSON":
            content = b'{"model": "spectr", "messages": ['
        elif kind == "wrong type":
            given["messages"] = "no list"
        elif kind == "unknown expert":
            given["experts"] = ["nobody-has-it"]
        elif kind == "unknown model":
            given["model"] = "spectr/nobody-has-it"
        elif kind == "empty allow-list":
            given["experts"] = []
        elif kind == "unknown path":
            path = "/v1/nothing"
        answer = await self.client.post(path, **({"content": content} if content else {"json": given}))
        assert answer.status_code == FAULTS[kind], f"status {answer.status_code}, not {FAULTS[kind]}"
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}, answer.text

    async def run(self, requests: int, concurrency: int, fault_share: float, pid: int | None) -> None:
        """All of it."""
        faulty = [self.random.random() < fault_share for _ in range(requests)]
        numbers = iter(range(requests))
        step = max(1, requests // 20)

        async def worker() -> None:
            for number in numbers:
                await self.one(number, faulty[number])
                if pid is not None and number % step == 0:
                    self.tally.memory.append(memory_of(pid))

        await asyncio.gather(*(worker() for _ in range(concurrency)))
        if pid is not None:
            await asyncio.sleep(1)
            self.tally.memory.append(memory_of(pid))


def memory_of(pid: int) -> float:
    """MiB that a process and its children take."""
    total = 0.0
    for process in (pid, *_children(pid)):
        try:
            found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{process}/status").read_text())
        except FileNotFoundError:
            continue
        total += int(found[1]) / 1024 if found else 0
    return total


def _children(pid: int) -> list[int]:
    found = [int(child) for path in Path(f"/proc/{pid}/task").glob("*/children") for child in path.read_text().split()]
    return found + [grandchild for child in found for grandchild in _children(child)]


@contextmanager
def server(options: list[str]) -> Iterator[tuple[str, int]]:
    """``spectr serve`` with these options; its address and process id."""
    command = [sys.executable, "-m", "spectr", "serve", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=dict(os.environ))
    try:
        assert process.stderr is not None
        for line in process.stderr:
            print(line, end="", file=sys.stderr)
            if found := re.search(r"at (http://\S+)/v1", line):
                yield found[1], process.pid
                return
        raise SystemExit("the server did not start")
    finally:
        process.terminate()
        process.wait(timeout=60)


def report(soak: Soak, wall: float) -> str:
    """The table."""
    tally = soak.tally
    seconds = sorted(tally.seconds) or [0.0]
    rows = [
        (
            "requests answered",
            f"{sum(tally.good.values())} ({tally.good['whole']} whole, {tally.good['stream']} streams)",
        ),
        ("tokens generated", f"{tally.tokens}, {tally.tokens / wall:.0f} a second"),
        ("seconds, median and 95 %", f"{seconds[len(seconds) // 2]:.2f}, {seconds[int(len(seconds) * 0.95)]:.2f}"),
        ("faults injected", str(sum(tally.faults.values()))),
        *((f"  {kind}", str(count)) for kind, count in sorted(tally.faults.items())),
        ("errors", str(len(tally.errors))),
    ]
    if tally.memory:
        quarter = tally.memory[len(tally.memory) // 4]
        rows.append(("memory, MiB", f"{quarter:.0f} after a quarter, {tally.memory[-1]:.0f} at the end"))
        rows.append(("  at each twentieth", " ".join(f"{taken:.0f}" for taken in tally.memory)))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


async def soak(url: str, pid: int | None, given: argparse.Namespace) -> int:
    headers = {"authorization": f"Bearer {given.key}"} if given.key else {}
    limits = httpx.Limits(max_connections=given.concurrency + 4)
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=300, limits=limits) as client:
        models = (await client.get("/v1/models")).raise_for_status().json()["data"]
        experts = next(model["experts"] for model in models if model["id"] == "spectr")
        run = Soak(client, experts, given.exact, given.seed)
        await run.alone()
        began = time.monotonic()
        await run.run(given.requests, given.concurrency, given.faults, pid)
        print(report(run, time.monotonic() - began))
        for error in run.tally.errors[:20]:
            print(f"  {error}")
    return 1 if run.tally.errors else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="of a server that runs; without it one is started")
    parser.add_argument("--key", help="API key")
    parser.add_argument("--pid", type=int, help="with --url: the server's process, to watch its memory")
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--faults", type=float, default=0.3, help="share of the requests that are faulty")
    parser.add_argument("--exact", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--seed", type=int, default=0)
    ours, theirs = sys.argv[1:], []
    if "--" in ours:
        at = ours.index("--")
        ours, theirs = ours[:at], ours[at + 1 :]
    given = parser.parse_args(ours)
    if given.url:
        return asyncio.run(soak(given.url, given.pid, given))
    with server(["--port", "0", *theirs]) as (url, pid):
        return asyncio.run(soak(url, pid, given))


if __name__ == "__main__":
    sys.exit(main())
