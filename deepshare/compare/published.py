"""What the papers report, for the faint layer of a picture: only for the same network and data set."""

import csv
from dataclasses import dataclass
from pathlib import Path

from deepshare import models

FILE = Path(__file__).with_name("published.csv")
_DATA_SETS = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100"}
_NETWORKS = {"resnet18": "ResNet18", "resnet34": "ResNet34", "wrn-22-8": "WRN-22-8"}


@dataclass(frozen=True)
class Published:
    """One row of a paper's table: thousands of ReLUs, top-1 accuracy in percent, and where it stands."""

    method: str
    relus_k: float
    accuracy: float
    paper: str
    table: str


def published_results(network: str, width: int | None, dataset: str) -> list[Published]:
    """The rows for a network of `models.create` and a data set of `data.load`; none where the papers have no such.

    width: of the network; another than the papers' is another network. None is the family's own.
    """
    if dataset not in _DATA_SETS or network not in _NETWORKS:
        return []
    if width not in (None, models.default_width(network)):
        return []
    with FILE.open(encoding="utf-8", newline="") as lines:
        rows = csv.DictReader(line for line in lines if not line.startswith("#"))
        wanted = [row for row in rows if row["network"] == _NETWORKS[network] and row["dataset"] == _DATA_SETS[dataset]]
    return [
        Published(row["method"], float(row["relus_k"]), float(row["metric"]), row["paper"], row["table"])
        for row in wanted
        if row["relus_k"] and row["metric"]
    ]
