"""Pictures of routing: their data, HTML pages and PNG files."""

from importlib.util import find_spec

from spectr.errors import MissingExtraError

if find_spec("matplotlib") is None:
    raise MissingExtraError("drawing pictures", "plots")

from spectr.plots.energy import write_energy_map
from spectr.plots.figures import write_heat_map, write_token_map
from spectr.plots.pages import write_page
from spectr.plots.palette import colours, tints
from spectr.plots.token_weights import TokenRouting, token_routing

__all__ = [
    "TokenRouting",
    "colours",
    "tints",
    "token_routing",
    "write_energy_map",
    "write_heat_map",
    "write_page",
    "write_token_map",
]
