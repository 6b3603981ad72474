"""What a server is to serve, for whichever engine does it."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from spectr.errors import SpectrError
from spectr.library import ExpertLibrary
from spectr.routers import Router
from spectr.serving.policy import Policy, read_policy

_BACKLOG = 2048  # connections that wait until they are taken, as uvicorn has it


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What ``spectr serve`` was asked for, checked.

    Attributes:
        library: Has the experts.
        experts: Those of them that are served, in alphabetical order.
        routers: Those that a request may name, by their names for clients; the first is the default.
        model: Folder or Hub id of the base model; ``None`` for the default one.
        base_name: The base model's name for clients.
        dtype: Of the model.
        served: The composed model's name for clients.
        policy_file: API keys, if there are any.
        host: Address to listen at.
        port: Likewise; 0 for a free one.
        count: Whether tokens are counted by expert for every request.
        grace: Seconds that answers under way have to end when the server is to.
        options: Of the engine's own command line.
    """

    library: ExpertLibrary
    experts: tuple[str, ...]
    routers: Mapping[str, Router]
    model: str | None
    base_name: str
    dtype: str
    served: str
    policy_file: Path | None
    host: str
    port: int
    count: bool
    grace: float = 10.0
    options: tuple[str, ...] = ()

    def policy(self) -> Policy | None:
        """The policy, checked against the experts.

        Raises:
            DataError: It is none, or names experts that are not there.
            SpectrError: There is none, and others than this machine could reach the server.
        """
        if self.policy_file is None:
            if not _is_loopback(self.host):
                raise SpectrError(
                    f"--host {self.host} without a policy: anybody who reaches it could use every expert",
                    expected="a policy file, or a loopback address",
                    do="--policy FILE (see docs/serving.md), or --host 127.0.0.1",
                )
            return None
        policy = read_policy(self.policy_file)
        policy.check(self.library.names)
        return policy

    def check(self) -> None:
        """Everything that can be checked before a model is loaded, but for the socket.

        Raises:
            SpectrError: See :meth:`policy`; or the composed model has the base model's name, or an answer would depend
                on experts that its request may not use.
        """
        self.policy()
        for name, router in self.routers.items():
            if router.combination.depends_on_residents:
                raise SpectrError(
                    f"router '{name}' with combine='{router.combine}': answers would depend on all experts "
                    "of the server, also on those that a request may not use",
                    expected="a combination of the chosen experts alone",
                    do="leave --combine out, or --combine ties",
                )
        if self.served == self.base_name:
            raise SpectrError(
                f"'{self.served}' is the base model's own name", do="serve under another name: --served-name"
            )

    def listen(self) -> socket.socket:
        """A socket that is bound, and listens, so that a second server cannot have it meanwhile; who connects waits.

        Raises:
            SpectrError: The address is not there, or taken.
        """
        kind = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        bound = socket.socket(kind)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            bound.bind((self.host, self.port))
            bound.listen(_BACKLOG)
        except OSError as error:
            bound.close()
            raise SpectrError(
                f"{self.host}, port {self.port}: {error.strerror or error}", do="choose others with --host and --port"
            ) from error
        return bound


def base_name(model: str | None, default: str) -> str:
    """What clients call a base model: its Hub id, or its folder's name."""
    if model is None:
        return default
    return Path(model).resolve().name if Path(model).exists() else model


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
