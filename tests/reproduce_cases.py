"""Tiny recipes on the digits for the tests of `deepshare reproduce`, and what two results have in common."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from deepshare.reproduce import Result
from deepshare.train.fields import plain

_COMMON = """
[data]
name = "digits"
limit = 64

[model]
name = "resnet18"
width = 2
blocks = [1, 1, 1, 1]
"""


def _phase(kind: str, distill: str, more: str = "lr = 0.05") -> str:
    return f'[[phase]]\nkind = "{kind}"\nepochs = 2\nbatch_size = 32\ndistill = "{distill}"\n{more}\n'


_MASKS = _phase("masks", "none", 'lr = 0.1\nstart = "fresh"')
_SHARED = _phase("gelu", "none") + _phase("switch", "gelu")
_PUBLISHED = """
[published]
paper = "deepshare"
table = "1"
method = "DeepShare"
network = "ResNet18"
dataset = "CIFAR-100"
relus_k = 6
"""
RECIPES = {
    "snl": '[plan]\nmethod = "snl"\nbudget = 150\n[snl]\nlasso = 0.1\n' + _MASKS + _phase("finetune", "none"),
    "share": '[plan]\nmethod = "weights"\ncounts_of = "snl"\nbudget = 120\n' + _SHARED + _PUBLISHED,
    "relu": '[plan]\nmethod = "relu"\n' + _phase("baseline", "none"),
    "diverging": '[plan]\nmethod = "relu"\n' + _phase("baseline", "none", "lr = 1e30"),
}


def write_recipes(folder: Path) -> dict[str, str]:
    """Every recipe as a file in `folder`; paths by name."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in RECIPES.items():
        (folder / f"{name}.toml").write_text(f'name = "{name}"\n{_COMMON}\n{text}')
    return {name: str(folder / f"{name}.toml") for name in RECIPES}


def comparable(result: Result) -> dict[str, Any]:
    """The result without speeds, dates and machines, which no two runs have in common."""
    values = {key: value for key, value in plain(result).items() if key not in ("seconds", "sessions", "test_looks")}
    speeds = ("seconds", "images_per_second")
    return {**values, "rows": [{key: row[key] for key in row if key not in speeds} for row in values["rows"]]}


@contextmanager
def counted_steps() -> Iterator[list[int]]:
    """The number of optimizer steps taken in this process meanwhile, in a list of one."""
    steps = [0]

    def count(_optimizer: torch.optim.Optimizer, _arguments: Any, _settings: Any) -> None:
        steps[0] += 1

    handle = register_optimizer_step_pre_hook(count)
    try:
        yield steps
    finally:
        handle.remove()
