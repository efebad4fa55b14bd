"""What the papers report: for the faint layer of a picture, and beside what a recipe reached."""

import csv
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path

from deepshare import models
from deepshare.train import RecipeError
from deepshare.train.recipe_parts import PublishedRow

FILE = Path(__file__).with_name("published.csv")
_DATA_SETS = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "tiny-imagenet": "Tiny-ImageNet"}
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
    return published_on(_DATA_SETS[dataset], (_NETWORKS[network],))


def published_on(dataset: str, networks: Container[str]) -> list[Published]:
    """The rows for a data set and networks, by the file's names for them, that have ReLUs and an accuracy."""
    return [
        Published(row["method"], float(row["relus_k"]), float(row["metric"]), row["paper"], row["table"])
        for row in _rows()
        if row["dataset"] == dataset and row["network"] in networks and row["relus_k"] and row["metric"]
    ]


def published_accuracy(row: PublishedRow) -> float:
    """What a paper's table has in the row that a recipe is for: top-1 accuracy in percent.

    Raises RecipeError: there is no such row, or it has no accuracy.
    """
    keys = ("paper", "table", "method", "network", "dataset")
    found = [
        float(line["metric"])
        for line in _rows()
        if all(line[key] == getattr(row, key) for key in keys)
        and line["relus_k"]
        and float(line["relus_k"]) == row.relus_k
        and line["metric"]
    ]
    if len(set(found)) != 1:
        shown = ", ".join(f"{key} {getattr(row, key)!r}" for key in (*keys, "relus_k"))
        raise RecipeError(f"published: wanted one row of {FILE.name} with {shown}; got {len(found)}")
    return found[0]


def _rows() -> list[dict[str, str]]:
    with FILE.open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(line for line in lines if not line.startswith("#")))
