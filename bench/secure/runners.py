"""Which function makes a visit of which system."""

from collections.abc import Callable
from functools import partial

from secure import crypten_cell, engine_cell
from secure.cells import Visit
from secure.links import Link
from secure.networks import Network

Runner = Callable[[Network, str, Link, int], Visit]  # network, weights, link, timed images
RUNNERS: dict[str, Runner] = {
    "crypten": crypten_cell.visit,
    "engine-tree": partial(engine_cell.visit, "tree"),
    "engine-dcf": partial(engine_cell.visit, "dcf"),
}
