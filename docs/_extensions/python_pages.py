"""A page for each public module, with every name of its ``__all__``."""

from __future__ import annotations

import inspect
from importlib import import_module

# In the order of the table of contents. A name that several modules offer is described on the page of the first.
MODULES = {
    "spectr.composition": "Compose a model with experts, and change it while it is in use.",
    "spectr.routers": "Routers, and what a prompt policy is made of.",
    "spectr.library": "Libraries of experts on disk.",
    "spectr.calibration": "Calibrate a library, without data.",
    "spectr.indexing": "Index a library, for shortlists.",
    "spectr.composed_model": "A composed model as one folder.",
    "spectr.layers": "Routed layers, and traces of what they chose.",
    "spectr.prompts": "Decisions for whole prompts.",
    "spectr.models": "Load models, encode prompts, generate answers.",
    "spectr.guidance": "Compare prompts with descriptions, for GLIDER.",
    "spectr.combine": "Combinations of the chosen experts.",
    "spectr.selection": "Which scores count, and with what weight.",
    "spectr.merging": "Merge experts into one adapter or into the base model.",
    "spectr.extraction": "Extract an expert from a fully fine-tuned model.",
    "spectr.training": "Train experts and gates.",
    "spectr.tasks": "Tasks, their prompts and their data.",
    "spectr.evaluation": "Accuracy and log-likelihoods of a routed model.",
    "spectr.benchmark": "Time a routed model next to others.",
    "spectr.plots": "Pictures and pages of a routing.",
    "spectr.paging": "The cache of experts in memory.",
    "spectr.adapters": "PEFT's adapters as files.",
    "spectr.spectral": "Spectral alignment: the numerical core.",
    "spectr.ops": "Operations and kernels of a routed layer.",
    "spectr.serving.engines": "Engines that serve a routed model.",
    "spectr.shipped": "The shipped experts.",
    "spectr.errors": "Errors and warnings.",
}
_WITHOUT_LIST = {  # modules without __all__, and what is public there
    "spectr.calibration": ("calibrate",),
    "spectr.indexing": ("build_index",),
    "spectr.guidance": ("QueryGuide",),
    "spectr.selection": ("All", "Selection", "TopK"),
    "spectr.shipped": ("shipped_experts",),
}


def public_names(module: str) -> tuple[str, ...]:
    """The public names of a module, in alphabetical order."""
    found = import_module(module)
    if module == "spectr.errors":
        return tuple(name for name, value in sorted(vars(found).items()) if _is_error(value))
    names = _WITHOUT_LIST.get(module) or found.__all__
    return tuple(sorted(name for name in names if not inspect.ismodule(getattr(found, name))))


def _is_error(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, (Exception,)) and value.__module__ == "spectr.errors"


def homes() -> dict[str, str]:
    """By the whole name of what is public, such as ``spectr.routers.Arrow``, the page that describes it."""
    found: dict[str, str] = {}
    described: dict[int, str] = {}
    for module in MODULES:
        for name in public_names(module):
            value = getattr(import_module(module), name)
            known = described.get(id(value)) if callable(value) else None
            found[f"{module}.{name}"] = known or module
            if callable(value):
                described.setdefault(id(value), module)
    return found


def python_pages() -> dict[str, str]:
    """The pages: one for each module, and a table of what ``import spectr`` offers."""
    where = homes()
    pages = {f"python/{module}.md": _module_page(module, where) for module in MODULES}
    return {"python/index.md": _index(), **pages}


def _index() -> str:
    import spectr

    lines = ["# Python", "", "`import spectr` offers these names. Each links to the module that describes it.", ""]
    lines += ["| name | described in |", "| --- | --- |"]
    for name in spectr.__all__:
        if name != "__version__":
            home = _home_of(getattr(spectr, name))
            lines.append(f"| [`spectr.{name}`](#{home}.{name}) | [`{home}`]({home}.md) |")
    lines += ["| `spectr.__version__` | the installed version |", "", "## Modules", ""]
    lines += ["| module | |", "| --- | --- |"]
    lines += [f"| [`{module}`]({module}.md) | {what} |" for module, what in MODULES.items()]
    return "\n".join([*lines, "", "```{toctree}", ":hidden:", *MODULES, "```", ""])


def _home_of(value: object) -> str:
    for module in MODULES:
        for name in public_names(module):
            if getattr(import_module(module), name) is value:
                return module
    raise LookupError(f"{value!r} is public in spectr, and no module of the reference has it")


def _module_page(module: str, where: dict[str, str]) -> str:
    lines = [f"# `{module}`", "", MODULES[module], ""]
    for name in public_names(module):
        home = where[f"{module}.{name}"]
        if home != module:
            lines += [f"`{name}` is described in [`{home}`]({home}.md).", ""]
            continue
        lines += [f"## {name}", "", "```{eval-rst}", *_directive(module, name), "```", ""]
    return "\n".join(lines)


def _directive(module: str, name: str) -> list[str]:
    value = getattr(import_module(module), name)
    if inspect.isclass(value):
        members = [] if issubclass(value, Exception) else ["   :members:"]
        return [f".. autoclass:: {module}.{name}", *members]
    if inspect.isroutine(value):
        return [f".. autofunction:: {module}.{name}"]
    text = [f"   :value: {value!r}"] if isinstance(value, (str, int, float)) else []
    return [f".. py:data:: {module}.{name}", *text]
