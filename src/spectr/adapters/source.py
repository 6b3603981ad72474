"""Where an adapter is: a folder here, or a repository on the Hub that is fetched into the Hub's cache."""

from __future__ import annotations

import os
import re
from pathlib import Path

from spectr.errors import AdapterError

_HUB_ID = re.compile(r"^(?P<repo>[\w.-]+/[\w.-]+)(?:/(?P<subfolder>[\w./-]+?))?(?:@(?P<revision>[\w./-]+))?$")
_FILES = ("adapter_config.json", "adapter_model.safetensors", "README.md", "expert.json", "gates.safetensors")


def locate_adapter(source: str | Path, name: str) -> Path:
    """The folder of an adapter, downloaded first where ``source`` is a Hub id.

    Raises:
        AdapterError: There is no such folder, and no such repository that can be reached.
    """
    folder = Path(os.path.expanduser(source))
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise AdapterError(
            f"expert '{name}': {source} is a file", expected="a folder with adapter_config.json", do="give its folder"
        )
    match = _HUB_ID.match(str(source))
    if not match or folder.is_absolute() or str(source).startswith("."):
        raise AdapterError(
            f"expert '{name}': there is no folder {source}",
            expected="a folder with adapter_config.json, or a Hub id like org/repo",
            do="check the path",
        )
    return _from_hub(name, **match.groupdict())


def _from_hub(name: str, repo: str, subfolder: str | None, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    inside = f"{subfolder}/" if subfolder else ""
    try:
        root = snapshot_download(repo, revision=revision, allow_patterns=[inside + file for file in _FILES])
    except Exception as error:  # the client raises its own, httpx's and OS errors
        raise AdapterError(
            f"expert '{name}': '{repo}{inside and '/' + inside}' is no folder here, and the Hub did not give it: "
            f"{type(error).__name__}",
            expected="an existing folder, or a Hub id that this machine can reach",
            do="check the name, the network, and whether the repository needs a login (hf auth login)",
        ) from error
    return Path(root) / (subfolder or "")
