"""Options that commands share, and what they stand for."""

from __future__ import annotations

import dataclasses
import inspect
import os
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from spectr.cli.console import bar, say
from spectr.cli.opened import open_composed, open_library, open_model
from spectr.errors import DataError, SpectrError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

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
_MANY = 64  # experts, beyond which "auto" reads them from disk as prompts call for them


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
    shortlist: Annotated[
        int | None,
        typer.Option(
            "--shortlist",
            help="Experts on a prompt's shortlist, for the router shortlist.",
            min=1,
            rich_help_panel=_PANEL,
        ),
    ] = None
    local: Annotated[
        str | None,
        typer.Option(
            help="The router among those on the shortlist; by default calibrated-prior.", rich_help_panel=_PANEL
        ),
    ] = None
    bits: Annotated[
        int | None,
        typer.Option(
            help="Bits of each number that a shortlist is made by: 8; with 16 (best for a list of one) or 32 it is "
            "certain to be the one that exact numbers give, which takes more memory and time.",
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
    router_temperature: Annotated[
        float | None, typer.Option(help="Temperature of the softmax over scores.", rich_help_panel=_PANEL)
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

    def experts(self) -> tuple[ExpertLibrary, Router]:
        """The library and the router, checked against each other before any model is loaded.

        Without ``top_k`` the router takes at most as many experts as there are.
        """
        from spectr.routers import GuidedRouter, check_needs, residents

        library = self._opened_library()
        if self.expert and self.router != "oracle":
            raise SpectrError(
                f"--expert {self.expert} is for the router that always takes it",
                do=f"-r oracle -e {self.expert}, or --allow {self.expert}",
            )
        if self.router == "oracle" and not self.expert:
            raise SpectrError(
                "router 'oracle' needs expert: the one that it always takes",
                expected=f"one of {', '.join(library)}",
                do="-r oracle -e NAME",
            )
        router = self._router(self.router_name(library))
        if self.top_k is None and (router.selection.k or 0) > len(library):
            router = dataclasses.replace(router, top_k=len(library))  # pyright: ignore[reportArgumentType]
        residents(router, library.names)
        library.check(*(self.allow or []))
        check_needs(router, library, self.allow or library.names)
        if not isinstance(router, GuidedRouter) and (self.writer or self.embedder):
            say("--writer and --embedder make no difference: this router compares no descriptions")
        self._tell(library, router)
        return library, router

    def for_tokens(self) -> Routing:
        """The same, with "auto" standing for a router that decides for each token, as vLLM needs."""
        if self.router != "auto" or open_composed(self.model):
            return self
        library = self._opened_library()
        name = "calibrated-token" if _is_calibrated(library) else "spectr"
        say(f"router: {name}, token by token, as vLLM routes; another by --router")
        return dataclasses.replace(self, router=name)

    def _opened_library(self) -> ExpertLibrary:
        """The library that was named, or a composed folder's own, or the shipped one."""
        folder = None if self.library else open_composed(self.model)
        return folder.open_library(str(self.model)) if folder else open_library(self.library)

    def _router(self, name: str) -> Router:
        from spectr.routers import Shortlist, get_router

        options = {
            "top_k": self.top_k,
            "expert": self.expert,
            "combine": self.combine,
            "temperature": self.router_temperature,
        }
        given = {key: value for key, value in options.items() if value is not None}
        if self.router == "auto" and (folder := open_composed(self.model)):
            own = {key: value for key, value in folder.router.items() if key != "name"}
            return get_router(name, **{**own, **given})
        if name != "shortlist":
            if self.shortlist or self.local or self.bits:
                raise SpectrError(
                    f"--shortlist, --local and --bits are for the router shortlist, not {name}", do="-r shortlist"
                )
            return get_router(name, **given)
        size = self.shortlist or (1 if self.router == "auto" else Shortlist().size)
        if size == 1 and (given or self.local):
            raise SpectrError(
                "a shortlist of one leaves nothing to choose: --local and its settings make no difference",
                do="leave them out, or ask for a longer one: --shortlist 16",
            )
        local = get_router(self.local or "calibrated-prior", **given)
        return Shortlist(size=size, local=local, bits=Shortlist().bits if self.bits is None else self.bits)

    def _tell(self, library: ExpertLibrary, router: Router) -> None:
        """What a user would not expect of the router that stands in for "auto", or of its number of experts."""
        if self.router == "auto" and not _is_calibrated(library) and open_composed(self.model) is None:
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
        if folder := open_composed(self.model):
            return folder.router["name"]
        if not _is_calibrated(library):
            return "spectr"
        return "shortlist" if len(library) > _MANY and all(map(library.indexed, library)) else "calibrated"

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
        from spectr.routers import GuidedRouter, PagedRouter

        guide = None
        if isinstance(router, GuidedRouter):
            guide = make_guide(model, tokenizer, self.writer, self.embedder, self.dtype)
        with bar() as advance:
            routed = compose(
                model,
                library,
                router,
                progress=lambda done, total: advance(what, done, total, ""),
                guide=guide,
                expert_memory=int(self.expert_memory * (1 << 30)) if isinstance(router, PagedRouter) else None,
            )
            return routed.allow(self.allow) if self.allow else routed


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f"{shown} {'is' if len(names) == 1 else 'are'}"


def _is_calibrated(library: ExpertLibrary) -> bool:
    return all(library.calibrated(name) for name in library)


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
