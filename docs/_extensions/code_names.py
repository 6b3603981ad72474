"""Names of the code in docstrings: a name without a description must exist; names of ``import spectr`` are links."""

from __future__ import annotations

import pkgutil
from typing import TYPE_CHECKING, Any

from python_pages import homes

if TYPE_CHECKING:
    from docutils.nodes import Element
    from sphinx.application import Sphinx


def exists(name: str) -> bool:
    """Whether a whole name, such as ``spectr.routers.router.Lengths``, is one of the package or of a class."""
    try:
        pkgutil.resolve_name(name)
    except AttributeError:  # an attribute that only objects of the class have
        above = name.rpartition(".")[0]
        return "." in above and exists(above) and isinstance(pkgutil.resolve_name(above), type)
    except (ImportError, ValueError):
        return False
    return True


def described(name: str) -> str | None:
    """For a name of ``import spectr`` the one under which the reference describes the object."""
    package, _, attribute = name.rpartition(".")
    if package != "spectr":
        return None
    value = pkgutil.resolve_name(f"spectr:{attribute}")
    places = [f"{module}:{place.removeprefix(f'{module}.')}" for place, module in homes().items() if callable(value)]
    return next((place.replace(":", ".") for place in places if pkgutil.resolve_name(place) is value), None)


def resolve(app: Sphinx, env: Any, node: Element, contnode: Element) -> Element | None:
    """What Sphinx does with a name that it does not find; nothing, which is a warning, where there is no such name."""
    name = str(node.get("reftarget", ""))
    if node.get("refdomain") != "py" or not name.startswith("spectr") or not exists(name):
        return None
    other = described(name)
    if other and other != name:
        domain = env.get_domain("py")
        found = domain.resolve_xref(env, node["refdoc"], app.builder, node["reftype"], other, node, contnode)
        return found or contnode
    return contnode


def setup(app: Sphinx) -> dict[str, bool]:
    """Have Sphinx ask for names that it does not find."""
    app.connect("missing-reference", resolve)
    return {"parallel_read_safe": True}
