"""Options that commands share."""

from __future__ import annotations

import dataclasses
import inspect
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import wraps
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from spectr.cli.console import bar, say
from spectr.cli.model_loading import check_writer, make_guide, open_model
from spectr.combine import COMBINATIONS
from spectr.errors import DataError, MissingExtraError, SpectrError, page
from spectr.routers.registries import ROUTERS

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from spectr.choosing import ResolvedRouting, RoutingRequest
    from spectr.composition import Routed
    from spectr.library import ExpertLibrary
    from spectr.models.base_model import Check
    from spectr.routers import Router
    from spectr.tasks.rows import Source

ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        help="Load this base model: a folder or a Hub id, by default SmolLM2-135M-Instruct. A composed folder also "
        "provides the experts and the router.",
    ),
]
BaseOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        help="Load this base model: a folder (of a composed folder, the base model in it) or a Hub id, by default "
        "SmolLM2-135M-Instruct.",
    ),
]
LibraryOption = Annotated[
    Path | None,
    typer.Option("--library", "-l", help="Use the experts in this folder; by default the shipped ones."),
]
_DTYPES = "auto, float32, bfloat16 or float16"


def known_dtype(dtype: str | None) -> str | None:
    """Check the name of a precision."""
    if dtype is not None and dtype not in _DTYPES.replace(" or", ",").split(", "):
        raise SpectrError(f"--dtype {dtype}", expected=_DTYPES)
    return dtype


def split_names(texts: Iterable[str]) -> list[str]:
    """Split names that were given one by one or with commas."""
    return [name.strip() for text in texts for name in text.split(",") if name.strip()]


def _split(texts: list[str] | None) -> list[str] | None:
    """Read the experts of an allow-list."""
    found = split_names(texts or ())
    if texts and not found:
        raise SpectrError(
            "the allow-list is empty", expected="at least one expert", do="name an expert, or omit --allow"
        )
    return found or None


DtypeOption = Annotated[str, typer.Option("--dtype", help=f"Choose the precision: {_DTYPES}.", callback=known_dtype)]
DataRootOption = Annotated[
    str | None,
    typer.Option(
        "--data-root",
        envvar="SPECTR_DATA",
        help='Resolve relative paths of data in this folder; "hub" takes each task\'s data from the Hub.',
    ),
]
LettersOption = Annotated[
    bool,
    typer.Option("--letters", help="List the options with letters; the answer is then a letter, not a word."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON to standard output.")]

_PANEL = "Routing"
_FORMER = {"shortlist": "size", "local": "token_router", "bits": "bits", "router_temperature": "temperature"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Routing:
    """Options of every command that routes: base model, experts and router."""

    model: ModelOption = None
    library: LibraryOption = None
    router: Annotated[
        str,
        typer.Option(
            "--router",
            "-r",
            help="Route with this router. auto: calibrated if the library is calibrated (shortlist, one expert, if "
            f"it is indexed and has more than 64), else spectr. Or: {', '.join(ROUTERS.entries)}, or a router from "
            f"another package. See {page('reference/routers')}.",
            rich_help_panel=_PANEL,
        ),
    ] = "auto"
    top_k: Annotated[
        int | None,
        typer.Option(
            "--top-k",
            "-k",
            help="Choose this many experts for each token and layer, or for each prompt.",
            min=1,
            rich_help_panel=_PANEL,
        ),
    ] = None
    expert: Annotated[
        str | None,
        typer.Option("--expert", "-e", help="Set the expert that the router oracle uses.", rich_help_panel=_PANEL),
    ] = None
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="Set another setting of the router, repeatable: --set temperature=0.5. With several routers it is for "
            f"all that have it; --set arrow.temperature=0.5 is for one. See {page('reference/routers')}.",
            rich_help_panel=_PANEL,
        ),
    ] = None
    expert_memory: Annotated[
        float,
        typer.Option(
            help="Hold experts in at most this many GiB of memory (router shortlist); the others stay on disk.",
            min=0.01,
            rich_help_panel=_PANEL,
        ),
    ] = 1.0
    combine: Annotated[
        str | None,
        typer.Option(
            help=f"Combine the chosen experts by {', '.join(COMBINATIONS.entries)}, or another package's method. "
            "outputs averages outputs, factors averages factors. ties:density=0.5 keeps half of the entries.",
            rich_help_panel=_PANEL,
        ),
    ] = None
    allow: Annotated[
        list[str] | None,
        typer.Option(
            "--allow",
            "-a",
            help="Allow only these experts: repeat the option, or separate names with commas.",
            rich_help_panel=_PANEL,
            callback=_split,
        ),
    ] = None
    writer: Annotated[
        str | None,
        typer.Option(
            help="Write GLIDER's instruction with this model: a folder, a Hub id, or http(s)://host/v1#MODEL of "
            "an OpenAI-compatible endpoint; none compares the prompt itself. By default the base model.",
            rich_help_panel=_PANEL,
            callback=check_writer,
        ),
    ] = None
    embedder: Annotated[
        str | None,
        typer.Option(
            help="Embed with this sentence-transformers model, for GLIDER; by default all-MiniLM-L6-v2.",
            rich_help_panel=_PANEL,
        ),
    ] = None
    dtype: DtypeOption = "auto"
    shortlist: Annotated[int | None, typer.Option("--shortlist", hidden=True)] = None
    local: Annotated[str | None, typer.Option("--local", hidden=True)] = None
    bits: Annotated[int | None, typer.Option("--bits", hidden=True)] = None
    router_temperature: Annotated[float | None, typer.Option("--router-temperature", hidden=True)] = None

    def request(self, routers: Sequence[str] | None = None, *, token_level: bool = False) -> RoutingRequest:
        """The options with these routers in place of ``router``; see :class:`spectr.choosing.RoutingRequest`."""
        from spectr.choosing import RoutingRequest

        return RoutingRequest(
            model=self.model,
            library=self.library,
            routers=routers or [self.router],
            settings=self._texts(),
            allow=self.allow,
            token_level=token_level,
        )

    def resolve(self, *, token_level: bool = False) -> ResolvedRouting:
        """Return the library and the router, checked against each other before a model is loaded.

        Without ``top_k``, the router takes at most as many experts as the library has.
        """
        found = self.request(token_level=token_level).resolve()
        self.announce(found.routers.values(), found.remarks)
        return found

    def announce(self, routers: Iterable[Router], remarks: Iterable[str]) -> None:
        """Print remarks on these routers, and check that this machine has what they need.

        Raises:
            MissingExtraError: A router compares descriptions, and nothing can embed sentences.
        """
        from spectr.library.needs import DESCRIBED

        guided = any(DESCRIBED in router.needs for router in routers)
        if guided and find_spec("sentence_transformers") is None:
            raise MissingExtraError("comparing prompts with descriptions", "glider")
        if (self.writer or self.embedder) and not guided:
            say("--writer and --embedder have no effect: the chosen router compares no descriptions")
        for remark in remarks:
            say(remark)

    def experts(self, *, token_level: bool = False) -> tuple[ExpertLibrary, Router]:
        """The library and the router of :meth:`resolve`."""
        found = self.resolve(token_level=token_level)
        return found.library, found.router

    def _texts(self) -> list[str]:
        """All settings as ``NAME=VALUE``. Options that ``--set`` replaces still work, with a warning."""
        texts = list(self.settings or [])
        for option, setting in _FORMER.items():
            if (value := getattr(self, option)) is not None:
                flag = f"--{option.replace('_', '-')}"
                say(f"warning: {flag} is deprecated and will be removed; use --set {setting}={value}")
                texts.append(f"{setting}={value}")
        short = {"top_k": self.top_k, "expert": self.expert, "combine": self.combine}
        return [*texts, *(f"{name}={value}" for name, value in short.items() if value is not None)]

    def base(self, *check: Check) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The base model and its tokenizer, checked before the weights are read."""
        return open_model(self.model, self.dtype, *check)

    def compose(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        library: ExpertLibrary,
        router: Router,
        what: str = "preparing layers",
    ) -> Routed:
        """Compose the model with the allowed experts, with a progress bar."""
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


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of each parameter that is a dataclass of options, after its own.

    Options that the command already has are not added.
    """
    signature, hints = inspect.signature(command), get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if dataclasses.is_dataclass(hint)}
    parameters = [p.replace(annotation=hints[name]) for name, p in signature.parameters.items() if name not in groups]
    members: dict[str, list[str]] = {}
    for group, kind in groups.items():
        shared = get_type_hints(kind, include_extras=True)
        added = [field for field in dataclasses.fields(kind) if field.name not in signature.parameters]
        members[group] = [field.name for field in added]
        parameters += [
            inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=shared[f.name])
            for f in added
        ]

    @wraps(command)
    def called(**given: Any) -> None:
        made = {group: groups[group](**{name: given.pop(name) for name in names}) for group, names in members.items()}
        command(**made, **given)

    parameters.sort(key=lambda parameter: parameter.kind)
    called.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportAttributeAccessIssue]
    called.__annotations__ = {}  # typer reads the signature
    return called


def check_target(path: Path | None, suffix: str) -> None:
    """Raise :class:`DataError` if a file cannot be written, before any work is done."""
    if path is None:
        return
    if path.suffix.lower() != suffix:
        raise DataError(f"{path} does not end in {suffix}", do=f"use the name {path.with_suffix(suffix)}")
    if path.is_dir():
        raise DataError(f"{path} is a folder", expected=f"a file that ends in {suffix}")
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if not (above.is_dir() and os.access(above, os.W_OK)):
        raise DataError(
            f"{path} cannot be written: {above} is not a writable folder",
            do="check the path, its permissions and the free space",
        )


_SETTINGS = "Settings (the paper's are the defaults)"


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Rows of data, with a task or with a prompt and its answers."""

    task: Annotated[
        str | None,
        typer.Option(
            help="Use this shipped task or task file. For finished experts the default is the shipped task with the "
            "expert's name."
        ),
    ] = None
    data: Annotated[
        str | None,
        typer.Option(help="Read the training rows from this JSONL file, or from hub:<dataset>[:<config>]:<split>."),
    ] = None
    data_root: DataRootOption = None
    prompt: Annotated[
        str | None, typer.Option(help='Set the prompt template, with the fields of a row: "Topic of: {title}".')
    ] = None
    answer: Annotated[str | None, typer.Option(help="Set the answer's template, for free text.")] = None
    choices: Annotated[
        str | None,
        typer.Option(help='List the answers in the order of the numbers in a row\'s field "label": "World,Sports".'),
    ] = None

    def source(self, **more: Any) -> Source:
        """The options, as the library takes them."""
        from spectr.tasks.rows import Source

        return Source(
            task=self.task,
            prompt=self.prompt,
            answer=self.answer,
            choices=self.choices,
            train=self.data,
            root=self.data_root,
            **more,
        )


def setting(text: str) -> Any:
    """An option of a run's settings, with its help."""
    return typer.Option(help=text, rich_help_panel=_SETTINGS)


def last_step(*folders: Path) -> str:
    """The step from which a run in one of these folders resumes."""
    from spectr.training import checkpoint_step

    step = max(map(checkpoint_step, folders))
    return f"stopped after step {step}; the same command resumes there" if step else "nothing was saved yet"
