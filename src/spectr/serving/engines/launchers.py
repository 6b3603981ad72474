"""How ``spectr serve`` starts each engine. Packages add engines with the entry-point group ``spectr.engines``."""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from spectr.errors import MissingExtraError, SpectrError
from spectr.registry import Registry

if TYPE_CHECKING:
    from spectr.composition import Routed
    from spectr.routers import Router
    from spectr.serving.server_settings import ServerSettings

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What an engine in this process builds its models from. An engine with its own processes does not need it.

    Attributes:
        open_model: Returns base model and tokenizer.
        compose: Composes a model: (model, tokenizer, router, phase of the progress).
        cache_tokens: Tokens of all running requests in memory, for continuous batching; ``None`` for one at a time.
    """

    open_model: Callable[[], tuple[Any, Any]]
    compose: Callable[[Any, Any, Router, str], Routed]
    cache_tokens: int | None = None


class Launcher(Protocol):
    """Starts an engine and serves until the process is interrupted.

    Attributes:
        by_token: Whether the router "auto" must decide for each token.
    """

    by_token: ClassVar[bool]

    def check(self, options: Sequence[str]) -> None:
        """Raise :class:`SpectrError` if the engine is not installed, or does not accept these options."""

    def launch(self, settings: ServerSettings, parts: Parts, say: Say) -> None:
        """Serve these settings; ``say`` prints one line."""


class Transformers:
    """The engine on transformers' own serving code. See :class:`Launcher`."""

    by_token: ClassVar[bool] = False

    def check(self, options: Sequence[str]) -> None:
        """See :class:`Launcher`; it has no options of its own."""
        if options:
            raise SpectrError(
                f"{' '.join(options)}: the engine transformers accepts no options after --",
                do="remove them; pass a policy file with --policy, and each router with --router",
            )

    def launch(self, settings: ServerSettings, parts: Parts, say: Say) -> None:
        """See :class:`Launcher`."""
        try:
            from spectr.serving.engines.generation import Batching
            from spectr.serving.engines.transformers import TransformersEngine, check_version
            from spectr.serving.run import listen
        except ImportError as error:
            raise MissingExtraError("spectr serve", "serve") from error
        from spectr.layers.base_layers import ModelLayers
        from spectr.serving.outliers import outliers_among

        check_version()
        with settings.listen() as bound:
            composed, tokenizer = _composed(settings, parts, say)
            experts = [settings.library[name] for name in composed.experts]
            engine = TransformersEngine(
                composed,
                tokenizer,
                base_model=settings.base_name,
                outlier_scores=outliers_among(experts, ModelLayers(composed.model, settings.library.folder)),
                batching=None if parts.cache_tokens is None else Batching(cache_tokens=parts.cache_tokens),
            )

            async def listening() -> None:
                try:
                    await listen(engine.app, engine, settings, bound, say)
                finally:
                    engine.stop()

            asyncio.run(listening())


class Vllm:
    """vLLM, in its own processes. See :class:`Launcher`."""

    by_token: ClassVar[bool] = True

    def check(self, options: Sequence[str]) -> None:
        """See :class:`Launcher`; vLLM checks its options itself."""
        if importlib.util.find_spec("vllm") is None:
            raise MissingExtraError("--engine vllm", "vllm")

    def launch(self, settings: ServerSettings, parts: Parts, say: Say) -> None:
        """See :class:`Launcher`."""
        try:
            from spectr.serving.engines.vllm import launch
        except ImportError as error:
            raise MissingExtraError("--engine vllm", "vllm") from error
        launch(settings, say)


def _composed(settings: ServerSettings, parts: Parts, say: Say) -> tuple[Any, Any]:
    """The model with all of its routers, and its tokenizer."""
    from spectr.composition.multi_router import MultiRouter

    base, tokenizer = parts.open_model()

    def maker(name: str, router: Router) -> Callable[[Any], Routed]:
        what = "preparing layers" + (f" for {name}" if len(settings.routers) > 1 else "")
        return lambda model: parts.compose(model, tokenizer, router, what)

    composed = MultiRouter(base, {name: maker(name, router) for name, router in settings.routers.items()})
    for name, size in list(composed.bytes.items())[1:]:
        say(f"router {name}: {size / (1 << 20):.1f} MiB of additional factors")
    return composed, tokenizer


ENGINES: Registry[Launcher] = Registry(
    kind="engine",
    group="spectr.engines",
    entries={
        "transformers": "spectr.serving.engines.launchers:Transformers",
        "vllm": "spectr.serving.engines.launchers:Vllm",
    },
)
