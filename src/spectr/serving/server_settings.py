"""What a server serves, for any engine."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spectr.choosing import RoutingRequest
from spectr.composition.multi_router import check_alike
from spectr.errors import LibraryError, SpectrError, page
from spectr.library import ExpertLibrary
from spectr.models import HUB_ID
from spectr.routers import Router, residents
from spectr.serving.catalog import AccessPolicy, read_policy

_BACKLOG = 2048  # waiting connections, as in uvicorn


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """What a server serves, checked.

    Attributes:
        library: The experts.
        experts: The served experts, in alphabetical order.
        routers: The routers that a request may choose, by their names for clients; the first is the default.
        model: Folder or Hub id of the base model; ``None`` for the default one.
        base_name: The base model's name for clients.
        dtype: Precision of the model.
        served_name: The composed model's name for clients.
        policy_file: API keys, if any.
        host: Address to listen on.
        port: Port to listen on; 0 for a free one.
        count: Whether to count tokens by expert for every request.
        grace: Seconds that running answers have when the server stops.
        options: Options of the engine's own command line.
        remarks: What may surprise a user.
    """

    library: ExpertLibrary
    experts: tuple[str, ...]
    routers: Mapping[str, Router]
    model: str | None
    base_name: str
    dtype: str
    served_name: str
    policy_file: Path | None
    host: str
    port: int
    count: bool
    grace: float = 10.0
    options: tuple[str, ...] = ()
    remarks: Sequence[str] = ()

    def policy(self) -> AccessPolicy | None:
        """The policy, checked against the experts.

        Raises:
            DataError: It is not a policy, or names unknown experts.
            SpectrError: There is no policy, and other machines could reach the server.
        """
        if self.policy_file is None:
            if not _is_loopback(self.host):
                raise SpectrError(
                    f"--host {self.host} needs a policy: without one, anyone who reaches it can use every expert",
                    expected="a policy file, or a loopback address",
                    do=f"--policy FILE ({page('howto/serving')}), or --host 127.0.0.1",
                )
            return None
        policy = read_policy(self.policy_file)
        policy.check(self.library.names)
        return policy

    def check(self) -> None:
        """Everything that can be checked before a model is loaded, except the socket.

        Raises:
            SpectrError: See :meth:`policy`; or the composed model has the base model's name, or answers would depend on
                experts that the request may not use.
        """
        self.policy()
        for name, router in self.routers.items():
            if router.combination.depends_on_residents:
                raise SpectrError(
                    f"router '{name}' with combine='{router.combine}': answers would depend on all experts "
                    "of the server, also on those that a request may not use",
                    expected="a combination of only the chosen experts",
                    do="omit --combine, or use --combine ties",
                )
        if self.served_name == self.base_name:
            raise SpectrError(
                f"'{self.served_name}' is the base model's own name", do="choose another name: --served-name"
            )

    def listen(self) -> socket.socket:
        """Bind a socket and listen, so that no second server can take it; connections wait.

        Raises:
            SpectrError: The address does not exist, or is taken.
        """
        kind = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        try:
            return socket.create_server((self.host, self.port), family=kind, backlog=_BACKLOG)
        except OSError as error:
            raise SpectrError(
                f"{self.host}, port {self.port}: {error.strerror or error}", do="choose others with --host and --port"
            ) from error


def make_settings(
    request: RoutingRequest, *, exclude: Sequence[str] = (), served_name: str, **given: Any
) -> ServerSettings:
    """Check everything that a server needs before a model is loaded.

    Args:
        request: Library and routers.
        exclude: Experts of the library that are not served.
        served_name: See :class:`ServerSettings`, as for all others.
        given: See :class:`ServerSettings`.

    Raises:
        SpectrError: A name is unknown, no expert is left, the routers cannot be served together, or the settings do not
            fit together (:meth:`ServerSettings.check`).
    """
    if len(request.routers) > 1 and "oracle" in request.routers:
        raise SpectrError(
            "the router oracle holds a single expert and cannot be served with other routers",
            do=f"omit it; a request chooses a single expert with the model {served_name}/EXPERT",
        )
    found = request.resolve()
    check_alike({name: residents(router, found.library.names) for name, router in found.routers.items()})
    found.library.check(*exclude)
    experts = tuple(name for name in sorted(request.allow or found.library) if name not in exclude)
    if not experts:
        raise LibraryError("--except leaves no expert to serve", do="exclude fewer experts")
    settings = ServerSettings(
        library=found.library,
        experts=experts,
        routers=found.routers,
        model=request.model,
        base_name=_base_name(request.model),
        served_name=served_name,
        remarks=found.remarks,
        **given,
    )
    settings.check()
    return settings


def _base_name(model: str | None) -> str:
    """A base model's name for clients: its Hub id, or the name of its folder."""
    if model is None:
        return HUB_ID
    return Path(model).resolve().name if Path(model).exists() else model


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
