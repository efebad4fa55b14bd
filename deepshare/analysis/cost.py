"""What a network computes for one image: ReLUs, multiply-accumulates and parameters of every site and stage."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from deepshare import models
from deepshare.analysis.delphi import gibibytes, seconds_of_relus
from deepshare.find import function_kind, is_activation, without_weights, zero_batch
from deepshare.plan import Plan, PlanError, check_is_plan
from deepshare.site import checked_image_size
from deepshare.text_table import aligned

OUTPUT = "output"  # the row behind the last site
NO_STAGE = "-"  # of a model that is none of models.create
_TRANSPOSED = (torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d)
_PRODUCTS = (F.linear, torch.conv1d, torch.conv2d, torch.conv3d, *_TRANSPOSED)


@dataclass(frozen=True)
class Row:
    """One site: its DReLUs, and the layers called since the site before it; or a stage, or the total."""

    name: str
    stage: str
    relus: int
    flops: int
    params: int


@dataclass(frozen=True)
class Cost:
    """Costs of one image of `input_size`.

    FLOPs are multiply-accumulates of convolutions and linear layers, one each, as the papers count them: no batch norm,
    bias, addition or pooling. Parameters are all there are, batch norms' included, where they are first used.

    Attributes:
        per_site: a row per site in call order, and one (`OUTPUT`) for what is computed after the last.
        per_stage: a row per stage. Layers count where they stand, which need not be the stage of the next site.
        total: of either.
    """

    per_site: tuple[Row, ...]
    per_stage: tuple[Row, ...]
    input_size: tuple[int, ...]

    @property
    def total(self) -> Row:
        return _sum("total", self.per_site)

    @property
    def relus(self) -> int:
        """DReLUs, as `Plan.drelus`."""
        return self.total.relus

    @property
    def flops(self) -> int:
        return self.total.flops

    @property
    def params(self) -> int:
        return self.total.params

    def table(self) -> str:
        """Sites, stages with their shares, and the total as text."""
        lines = [("site", "stage", "DReLUs", "FLOPs", "parameters"), (), *(_cells(row) for row in self.per_site), ()]
        if [row.name for row in self.per_stage] != [NO_STAGE]:
            lines += [*(_cells(row, self.total) for row in self.per_stage), ()]
        lines.append(_cells(self.total))
        size = "x".join(map(str, self.input_size))
        note = (
            f"Per image of {size}. FLOPs: multiply-accumulates of convolutions and linear layers. A site's line has\n"
        )
        note += "the layers called since the site before it, a stage's those that stand in the stage.\n"
        circuits = f"{seconds_of_relus(self.relus):.3f} s online, {gibibytes(self.relus):.3f} GiB stored"
        note += f"Garbled circuits under DELPHI (estimate, 21 us and 18 KiB a ReLU): {circuits}."
        return f"{aligned(lines, left=2)}\n{note}"


def cost(model: nn.Module, input_size: Iterable[int], *, plan: Plan | None = None) -> Cost:
    """What `model` computes for one image; a model on the meta device will do.

    Args:
        model: any model that runs on a batch [1, *input_size]; stages are named if it is one of `models.create`.
        input_size: (C, H, W).
        plan: count this plan's DReLUs instead of those of the activations the model has.

    Raises:
        PlanError: as `Plan.of`; or the plan is for another model.
    """
    found = Plan.of(model, checked_image_size("cost", input_size))
    if plan is not None:
        check_is_plan("cost", plan)
        plan.check_fits(found)
    probe = without_weights(model).eval()
    watch = _Watch(probe)
    with torch.no_grad(), watch:
        probe(zero_batch(probe, found.input_size))
    if watch.site != len(found):
        raise PlanError(f"cost: {len(found)} activations were found, then {watch.site}: the model's runs differ")
    unseen = sum(parameter.numel() for parameter in model.parameters()) - sum(entry.params for entry in watch.entries)
    rest = _Entry(len(found), models.HEAD, 0, unseen)  # such as a layer whose weights a function is given
    entries = [*watch.entries, rest]
    sites = [(site.name, _stage(model, site.name), site.drelus) for site in plan or found]
    per_site = [_row(*site, [e for e in entries if e.site == i]) for i, site in enumerate(sites)]
    per_site.append(_row(OUTPUT, _stage(model, models.HEAD), 0, [e for e in entries if e.site == len(sites)]))
    return Cost(tuple(per_site), _per_stage(model, sites, entries), found.input_size)


@dataclass(frozen=True)
class _Entry:
    """A layer's call or a module's first: how many sites came before, the module's path, what it costs."""

    site: int
    path: str
    flops: int
    params: int


def _row(name: str, stage: str, relus: int, entries: list[_Entry]) -> Row:
    return Row(name, stage, relus, sum(e.flops for e in entries), sum(e.params for e in entries))


def _per_stage(model: nn.Module, sites: list[tuple[str, str, int]], entries: list[_Entry]) -> tuple[Row, ...]:
    work = [(_stage(model, entry.path), entry) for entry in entries]
    return tuple(
        _row(stage, "", sum(relus for _, of, relus in sites if of == stage), [e for of, e in work if of == stage])
        for stage in dict.fromkeys((*(stage for stage, _ in work), *(stage for _, stage, _ in sites)))
    )


def _stage(model: nn.Module, path: str) -> str:
    try:
        return models.stage_of(model, path)
    except PlanError:
        return NO_STAGE


class _Watch(TorchFunctionMode):
    """Notes what runs: parameters at their module's first call, products where they are computed; counts sites."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.site = 0
        self.entries: list[_Entry] = []
        self._stack: list[tuple[str, bool]] = []  # path, whether in an activation
        self._counted: set[nn.Parameter] = set()
        for path, module in model.named_modules():
            module.register_forward_pre_hook(self._entering(path))
            module.register_forward_hook(self._leave)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        path, inside = self._stack[-1] if self._stack else ("", False)
        if not inside:
            products = _products(func, args, kwargs or {}, result)
            if products:
                self.entries.append(_Entry(self.site, path, products, 0))
            self.site += function_kind(func) is not None
        return result

    def _entering(self, path: str) -> Callable[[nn.Module, Any], None]:
        def enter(module: nn.Module, _args: Any) -> None:
            fresh = set(module.parameters(recurse=False)) - self._counted
            self._counted |= fresh
            if fresh:
                self.entries.append(_Entry(self.site, path, 0, sum(parameter.numel() for parameter in fresh)))
            self._stack.append((path, is_activation(module) or bool(self._stack and self._stack[-1][1])))

        return enter

    def _leave(self, module: nn.Module, _args: Any, _output: Any) -> None:
        self._stack.pop()
        self.site += is_activation(module) and not (self._stack and self._stack[-1][1])


def _products(func: object, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
    """Multiply-accumulates of one call on one image; 0 for what is no convolution or linear layer."""
    if not any(func is known for known in _PRODUCTS):
        return 0
    weight = args[1] if len(args) > 1 else kwargs["weight"]  # [O, I / groups, *kernel]; linear [O, I]
    each = math.prod(weight.shape[1:])
    counted = (args[0] if args else kwargs["input"]) if func in _TRANSPOSED else result
    return int(counted.numel()) * each


def _sum(name: str, rows: Iterable[Row]) -> Row:
    rows = tuple(rows)
    return Row(name, "", sum(r.relus for r in rows), sum(r.flops for r in rows), sum(r.params for r in rows))


def _cells(row: Row, total: Row | None = None) -> tuple[str, ...]:
    """The cells of one line; with `total`, each number's share of it behind the number."""
    numbers = [f"{value:,}" for value in (row.relus, row.flops, row.params)]
    if total is not None:
        wholes = (total.relus, total.flops, total.params)
        parts = (row.relus, row.flops, row.params)
        shares = [100 * part / whole if whole else 0.0 for part, whole in zip(parts, wholes, strict=True)]
        numbers = [f"{number}  {share:5.2f} %" for number, share in zip(numbers, shares, strict=True)]
    return (row.name, row.stage, *numbers)
