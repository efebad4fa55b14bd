"""A cell is one figure of the table: network, system, weights, link. What was measured of it is kept in its own file.

A cell is visited several times, each time by fresh processes and in turns with the other cells, so that what disturbs
the machine disturbs all alike. A killed run goes on with the next visit.
"""

import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from deepshare.files import write_whole
from secure import machine
from secure.links import Link
from secure.networks import Network

SYSTEMS = ("crypten", "engine-tree", "engine-dcf")
WEIGHTS = ("public", "secret")
Visit = dict[str, Any]  # what a runner returns: see crypten_cell.visit


class NotHereError(RuntimeError):
    """A cell that is not run; the message is what stands in the table."""


@dataclass(frozen=True)
class Cell:
    """What is measured."""

    network: Network
    system: str
    weights: str
    link: Link

    @property
    def slug(self) -> str:
        return f"{self.network.slug}-{self.system}-{self.weights}-{self.link.slug}"


@dataclass(frozen=True)
class Found:
    """A cell's figures over its visits."""

    cell: Cell
    visits: tuple[Visit, ...]

    @property
    def online(self) -> list[float]:
        """Seconds of each timed inference, over all visits."""
        return [seconds for visit in self.visits for seconds in visit["online"]]

    @property
    def seconds(self) -> float:
        return median(self.online)

    @property
    def dealing(self) -> float:
        return median(visit["dealing"] for visit in self.visits)

    @property
    def preparing(self) -> float:
        return median(visit["preparing"] for visit in self.visits)

    def __getitem__(self, key: str) -> Any:
        """A count, the same in every visit."""
        return self.visits[0][key]


class Store:
    """A folder with one JSON a cell."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def visits(self, cell: Cell) -> list[Visit]:
        path = self._path(cell)
        return json.loads(path.read_text())["visits"] if path.exists() else []

    def add(self, cell: Cell, visit: Visit) -> None:
        kept = [*self.visits(cell), visit]
        counts = {tuple(one[key] for key in ("rounds", "server_bytes", "client_bytes")) for one in kept}
        if len(counts) > 1:
            raise RuntimeError(
                f"{cell.slug}: visits counted different rounds or bytes {sorted(counts)}; delete its file"
            )
        named = {"network": cell.network.name, "system": cell.system, "weights": cell.weights, "link": cell.link.words}
        write_whole(self._path(cell), json.dumps({**named, "visits": kept}, indent=1) + "\n")

    def refuse(self, cell: Cell, reason: str) -> None:
        """Notes why a cell is not measured here."""
        record = {"network": cell.network.name, "refused": reason, "visits": []}
        write_whole(self._path(cell), json.dumps(record) + "\n")

    def refused(self, cell: Cell) -> str | None:
        path = self._path(cell)
        return json.loads(path.read_text()).get("refused") if path.exists() else None

    def found(self, cells: Sequence[Cell]) -> dict[Cell, Found]:
        """The cells that were visited."""
        made = {cell: self.visits(cell) for cell in cells}
        return {cell: Found(cell, tuple(visits)) for cell, visits in made.items() if visits}

    def _path(self, cell: Cell) -> Path:
        return self._folder / f"{cell.slug}.json"


def pending(store: Store, cells: Sequence[Cell], visits: int) -> Iterator[Cell]:
    """What is left to measure, in order: every cell up to its first visit, every cell up to its second, and so on."""
    for number in range(1, visits + 1):
        for cell in cells:
            if len(store.visits(cell)) < number and store.refused(cell) is None:
                yield cell


def stamped(visit: Visit) -> Visit:
    """With what its seconds depend on besides: the commit, and the machine's load at the end."""
    when = time.strftime("%Y-%m-%d %H:%M", time.gmtime())
    return {**visit, "when": when, "commit": machine.commit(), "load_1": os.getloadavg()[0]}
