"""Options that commands share, and what they stand for."""

from __future__ import annotations

import dataclasses
import inspect
import os
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from spectr.cli.console import bar, say
from spectr.cli.model_loading import open_model
from spectr.errors import DataError, SpectrError
from spectr.shipped import open_library

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from spectr.composed_model import Settings
    from spectr.composition import Routed
    from spectr.library import ExpertLibrary
    from spectr.routers import Router

ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        help="Folder or Hub id of the base model, or a composed folder, whose experts and router are then the default; "
        "without it SmolLM2-135M-Instruct.",
    ),
]
BaseOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        help="Folder or Hub id of the base model, or a composed folder, for the base model in it; "
        "without it SmolLM2-135M-Instruct.",
    ),
]
LibraryOption = Annotated[
    Path | None,
    typer.Option("--library", "-l", help="Folder of experts; the default is the shipped ones."),
]
_DTYPES = ("auto", "float32", "bfloat16", "float16")


def known_dtype(dtype: str) -> str:
    """A precision by name, checked."""
    if dtype not in _DTYPES:
        raise SpectrError(f"--dtype {dtype}", expected="auto, float32, bfloat16 or float16")
    return dtype


def _split(names: list[str] | None) -> list[str] | None:
    """Experts that were given one by one, or several with commas."""
    if not names:
        return None
    found = [name.strip() for text in names for name in text.split(",") if name.strip()]
    if not found:
        raise SpectrError(
            "the allow-list is empty", expected="at least one expert", do="name some, or leave --allow out"
        )
    return found


DtypeOption = Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.", callback=known_dtype)]
DataRootOption = Annotated[
    str | None,
    typer.Option(
        "--data-root",
        envvar="SPECTR_DATA",
        help='Folder that relative paths of data start from; or "hub": take each task\'s data from the Hub.',
    ),
]
LettersOption = Annotated[
    bool,
    typer.Option("--letters", help="List the options as letters: the answer is a letter, not the label's word."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON to standard output.")]

_PANEL = "Routing"
_FORMER = {"shortlist": "size", "local": "token_router", "bits": "bits", "router_temperature": "temperature"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Routing:
    """Base model, experts and router, as every command that routes is given them; see :func:`with_routing`."""

    model: ModelOption = None
    library: LibraryOption = None
    router: Annotated[
        str,
        typer.Option(
            "--router",
            "-r",
            help="How experts are chosen. auto: calibrated where the library is (shortlist, of one expert, where it is "
            "indexed and has more than 64), else spectr. Or shortlist, spectr, spectr-paper, "
            "spectr-softmax, spectr-projection, spectr-code, calibrated, calibrated-token, calibrated-prior, arrow, "
            "lag, seqr, phatgoose, glider, glider-global, glider-spectr, mu (or uniform), oracle, or one that a "
            "package added. See docs/routers.md.",
            rich_help_panel=_PANEL,
        ),
    ] = "auto"
    top_k: Annotated[
        int | None,
        typer.Option(
            "--top-k", "-k", help="Experts for each token and layer, or each prompt.", min=1, rich_help_panel=_PANEL
        ),
    ] = None
    expert: Annotated[
        str | None,
        typer.Option("--expert", "-e", help="The expert that the router oracle always takes.", rich_help_panel=_PANEL),
    ] = None
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="Set another setting of the router, once for each: --set temperature=0.5. With several routers it is "
            "for all that have it; --set arrow.temperature=0.5 is for one. See docs/routers.md.",
            rich_help_panel=_PANEL,
        ),
    ] = None
    expert_memory: Annotated[
        float,
        typer.Option(
            help="GiB that experts may take, for the router shortlist; the rest stay on disk.",
            min=0.01,
            rich_help_panel=_PANEL,
        ),
    ] = 1.0
    combine: Annotated[
        str | None,
        typer.Option(
            help="Choose how the chosen experts become one: outputs (their mean output), factors (as in the paper's "
            "tables), ties, dare, dare-ties or knots. ties:density=0.5 keeps half of the entries, dare:density=0.1 "
            "a tenth.",
            rich_help_panel=_PANEL,
        ),
    ] = None
    allow: Annotated[
        list[str] | None,
        typer.Option(
            "--allow",
            "-a",
            help="Only these experts may be chosen: once for each, or with commas.",
            rich_help_panel=_PANEL,
            callback=_split,
        ),
    ] = None
    writer: Annotated[
        str | None,
        typer.Option(
            help="Who writes GLIDER's instruction for a prompt: folder or Hub id of a model, http(s)://host/v1#MODEL "
            "of an OpenAI-compatible endpoint, or none to compare the prompt itself; by default the base model.",
            rich_help_panel=_PANEL,
        ),
    ] = None
    embedder: Annotated[
        str | None,
        typer.Option(
            help="GLIDER's model of sentence-transformers; by default all-MiniLM-L6-v2.", rich_help_panel=_PANEL
        ),
    ] = None
    dtype: DtypeOption = "auto"
    shortlist: Annotated[int | None, typer.Option("--shortlist", hidden=True)] = None
    local: Annotated[str | None, typer.Option("--local", hidden=True)] = None
    bits: Annotated[int | None, typer.Option("--bits", hidden=True)] = None
    router_temperature: Annotated[float | None, typer.Option("--router-temperature", hidden=True)] = None

    def experts(self) -> tuple[ExpertLibrary, Router]:
        """The library and the router, checked against each other before any model is loaded.

        Without ``top_k`` the router takes at most as many experts as there are.
        """
        library, routers = routers_of([self])
        [router] = routers.values()
        return library, router

    def _texts(self) -> list[str]:
        """All settings as ``NAME=VALUE``; options that ``--set`` replaces still work, with a warning."""
        texts = list(self.settings or [])
        for option, setting in _FORMER.items():
            if (value := getattr(self, option)) is not None:
                flag = f"--{option.replace('_', '-')}"
                say(f"warning: {flag} is deprecated, and the next version drops it; use --set {setting}={value}")
                texts.append(f"{setting}={value}")
        short = {"top_k": self.top_k, "expert": self.expert, "combine": self.combine}
        return [*texts, *(f"{name}={value}" for name, value in short.items() if value is not None)]

    def _defaults(self, name: str) -> dict[str, Any]:
        """Settings that "auto" stands for: a composed folder's, or a shortlist of one."""
        if self.router != "auto":
            return {}
        if folder := self._composed():
            return {key: value for key, value in folder.router.items() if key != "name"}
        return {"size": 1} if name == "shortlist" else {}

    def for_tokens(self) -> Routing:
        """The same, with "auto" standing for a router that decides for each token, as vLLM needs."""
        from spectr.choosing import token_router_for

        if self.router != "auto" or self._composed():
            return self
        name = token_router_for(self._opened_library())
        say(f"router: {name}, token by token, as vLLM routes; another by --router")
        return dataclasses.replace(self, router=name)

    def _composed(self) -> Settings | None:
        from spectr.choosing import open_composed

        return open_composed(self.model)

    def _opened_library(self) -> ExpertLibrary:
        """The library that was named, or a composed folder's own, or the shipped one."""
        folder = None if self.library else self._composed()
        return folder.open_library(str(self.model)) if folder else open_library(self.library)

    def _tell(self, library: ExpertLibrary, router: Router) -> None:
        """What a user would not expect of the router that stands in for "auto", or of its number of experts."""
        from spectr.choosing import is_calibrated
        from spectr.library.needs import DESCRIBED

        if (self.writer or self.embedder) and DESCRIBED not in router.needs:
            say("--writer and --embedder make no difference: this router compares no descriptions")
        if self.router == "auto" and not is_calibrated(library) and self._composed() is None:
            new = [name for name in library if not library.calibrated(name)]
            say(
                f"router: spectr, token by token, as {_some(new)} not calibrated; for the far better one: "
                f"spectr library calibrate --library {library.origin}"
            )
        there, k = len(self.allow or library), router.selection.k or 0
        if k > 1 and k >= there:
            say(f"{'all' if there > 1 else 'one'} of {there} work on every token: the router takes up to {k}")

    def router_name(self, library: ExpertLibrary) -> str:
        """The router that was asked for, or the one that "auto" stands for with this library."""
        if self.router != "auto":
            return self.router
        from spectr.choosing import router_for

        folder = self._composed()
        return folder.router["name"] if folder else router_for(library)

    def base(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The base model and its tokenizer."""
        return open_model(self.model, self.dtype)

    def compose(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        library: ExpertLibrary,
        router: Router,
        what: str = "preparing layers",
    ) -> Routed:
        """The model composed with the experts that are allowed, with a progress bar."""
        from spectr.cli.guides import make_guide
        from spectr.composition import compose
        from spectr.library.needs import DESCRIBED

        guide = None
        if DESCRIBED in router.needs:
            guide = make_guide(model, tokenizer, self.writer, self.embedder, self.dtype)
        with bar() as advance:
            routed = compose(
                model,
                library,
                router,
                progress=lambda done, total: advance(what, done, total, ""),
                guide=guide,
                expert_memory=int(self.expert_memory * (1 << 30)) if router.policy and router.policy.pages else None,
            )
            return routed.allow(self.allow) if self.allow else routed


def routers_of(routings: Sequence[Routing]) -> tuple[ExpertLibrary, dict[str, Router]]:
    """The library and the routers by name of requests that differ in their router alone, checked against each other."""
    from spectr.choosing import make_routers
    from spectr.routers.options import options_of

    first = routings[0]
    library = first._opened_library()
    names = [routing.router_name(library) for routing in routings]
    for name in names:
        if names.count(name) > 1:
            raise SpectrError(f"--router {name} twice", expected="each router once", do="leave one out")
    if first.expert and not any("expert" in options_of(name) for name in names):
        raise SpectrError(
            f"--expert {first.expert} is for a router that has this setting, such as oracle",
            do=f"-r oracle -e {first.expert}, or --allow {first.expert}",
        )
    texts = first._texts()
    if "oracle" in names and not any(text.startswith(("expert=", "oracle.expert=")) for text in texts):
        raise SpectrError(
            "router 'oracle' needs expert: the one that it always takes",
            expected=f"one of {', '.join(library)}",
            do="-r oracle -e NAME",
        )
    defaults = {name: routing._defaults(name) for name, routing in zip(names, routings, strict=True)}
    routers = make_routers(names, texts, library, defaults=defaults, allow=first.allow)
    for routing, router in zip(routings, routers.values(), strict=True):
        routing._tell(library, router)
    return library, routers


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f"{shown} {'is' if len(names) == 1 else 'are'}"


def with_routing(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command that takes ``routing: Routing`` the options that make one, after its own.

    One that the command has itself is not given to it again.
    """
    signature, hints = inspect.signature(command), get_type_hints(command, include_extras=True)
    shared = get_type_hints(Routing, include_extras=True)
    fields = dataclasses.fields(Routing)
    defaults = {field.name: field.default for field in fields if field.name not in signature.parameters}
    own = [
        parameter.replace(annotation=hints[name])
        for name, parameter in signature.parameters.items()
        if name != "routing"
    ]
    added = [
        inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default, annotation=shared[name])
        for name, default in defaults.items()
    ]

    @wraps(command)
    def called(**given: Any) -> None:
        command(Routing(**{name: given.pop(name) for name in defaults}), **given)

    called.__signature__ = inspect.Signature([*own, *added])  # pyright: ignore[reportAttributeAccessIssue]
    called.__annotations__ = {}  # typer reads the signature
    return called


def check_target(path: Path | None, suffix: str) -> None:
    """Raise :class:`DataError` where a file that is to be written could not be, before any work is done."""
    if path is None:
        return
    if path.suffix.lower() != suffix:
        raise DataError(f"{path} does not end in {suffix}", do=f"name it {path.with_suffix(suffix)}")
    if path.is_dir():
        raise DataError(f"{path} is a folder", expected=f"a file to write, ending in {suffix}")
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if not (above.is_dir() and os.access(above, os.W_OK)):
        raise DataError(
            f"{path} cannot be written: {above} is no folder that can be written to",
            do="check the path, its permissions and the free space",
        )
