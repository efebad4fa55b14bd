"""Arguments of another kind than asked for: one line that names the function, what was wanted and what came."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from deepshare import Plan, apply_plan, convert, models
from deepshare.analysis.capacity import best_split, capacity
from deepshare.analysis.cost import cost
from deepshare.analysis.delphi import delphi
from deepshare.budget import BudgetError, allocate, weights_of
from deepshare.fuse import fuse
from deepshare.methods import deepreduce, equalization, snl
from deepshare.methods.deepreshape import equalized
from deepshare.methods.merge import merge_linear
from deepshare.methods.variant import for_budget
from deepshare.plan import PlanError

SIZE = (3, 8, 8)
SPEC = {"name": "resnet18", "num_classes": 3, "width": 2}
MODEL = models.create(**SPEC)
PLAN = Plan.of(MODEL, SIZE)
MASKS = {site.name: torch.ones(site.shape) for site in PLAN}

CASES: dict[str, tuple[Callable[[Any], object], type[Exception], str, tuple[object, ...]]] = {
    "Plan.of": (
        lambda it: Plan.of(it, SIZE),
        PlanError,
        "model must be an nn.Module",
        (None, "resnet18", torch.nn.ReLU),
    ),
    "fuse": (lambda it: fuse(it, SIZE), PlanError, "fuse: model must be an nn.Module", (None, "resnet18")),
    "cost": (lambda it: cost(it, SIZE), PlanError, "model must be an nn.Module", (None, "resnet18")),
    "apply_plan": (
        lambda it: apply_plan(MODEL, it),
        PlanError,
        "apply_plan: plan must be a Plan",
        (None, {}, "p.json"),
    ),
    "allocate": (
        lambda it: allocate(it, "uniform", 9),
        PlanError,
        "allocate: plan must be a Plan",
        (None, {}, "p.json"),
    ),
    "weights_of": (lambda it: weights_of(it), PlanError, "weights_of: plan must be a Plan", (None, {}, "p.json")),
    "cull": (lambda it: deepreduce.cull(MODEL, it, ["S1"]), PlanError, "cull: plan must be a Plan", (None, "p.json")),
    "masked plan": (lambda it: snl.binarise(it, MASKS, 9), PlanError, "snl: plan must be a Plan", (None, "p.json")),
    "masks": (lambda it: snl.binarise(PLAN, it, 9), snl.SNLError, "snl: masks must be a mapping", (None, 5, "m")),
    "mask": (
        lambda it: snl.binarise(PLAN, {**MASKS, "layer1.0.relu1": it}, 9),
        snl.SNLError,
        "the mask of site 'layer1.0.relu1' must be a tensor",
        (None, 5, [1]),
    ),
    "lasso": (lambda it: snl.SNLSettings(lasso=it), snl.SNLError, "snl: lasso must be finite", (None, "x", True)),
    "spec": (
        lambda it: deepreduce.pipeline(it, ("S1", "S2", "S3", "S4"), SIZE),
        PlanError,
        "pipeline: spec must be a mapping with a name",
        (None, "resnet18", {}, []),
    ),
    "shape": (lambda it: equalized(it, (3, 2, 4, 1)), PlanError, "spec must be a mapping", (None, "resnet18", {}, [])),
    "network": (lambda it: deepreduce.cull(it, PLAN, "S1"), PlanError, "spec must be a mapping", (None, "resnet18", 5)),
    "image size": (
        lambda it: deepreduce.pipeline(SPEC, ("S1", "S2", "S3", "S4"), it),
        PlanError,
        "input_size must be",
        (None, 5, (3, 0, 8)),
    ),
    "best_split": (
        lambda it: best_split(9, 9, it),
        ValueError,
        "best_split: budget must be in 0..18",
        (None, "x", 1.5),
    ),
    "capacity": (lambda it: capacity(9, it), ValueError, "d2 must be an int", (None, "x", 1.5, float("nan"))),
    "delphi": (lambda it: delphi(it, 0.1), ValueError, "delphi: relus must be at least 0", (None, "x", float("nan"))),
    "most": (
        lambda it: equalization.equalize_depth((3, 2, 4, 1), most=it),
        equalization.EqualizationError,
        "equalize_depth: most must be ints of at least 1",
        ("x", float("nan"), [5]),
    ),
    "stages": (
        lambda it: deepreduce.thin(MODEL, PLAN, it),
        PlanError,
        "thin: stages must be",
        (None, 5, [1], [["S1"]]),
    ),
    "order": (
        lambda it: deepreduce.pipeline(SPEC, it, SIZE),
        PlanError,
        "pipeline: order must be",
        (None, 5, (1, 2, 3, 4), ("S1", None, "S2", "S3")),
    ),
    "alpha": (lambda it: deepreduce.reshape(SPEC, alpha=it), ValueError, "reshape: alpha must be", (None, "x", True)),
    "equalize": (
        lambda it: equalization.equalize_width(it),
        equalization.EqualizationError,
        "equalize_width: order must be a permutation of S1..S4",
        (None, 5, (), "S1"),
    ),
    "blocks": (
        lambda it: equalization.equalize_width((1, 2, 3, 4), it),
        equalization.EqualizationError,
        "equalize_width: blocks must be ints",
        (None, 5, (2, 0, 2, 2)),
    ),
    "for_budget": (lambda it: for_budget([], it), BudgetError, "for_budget: budget must be an int", (None, "x", 1.5)),
    "max_cost": (
        lambda it: merge_linear(MODEL, SIZE, max_cost=it),
        ValueError,
        "merge_linear: max_cost must be above 0",
        (None, "x", float("nan")),
    ),
}


@pytest.mark.parametrize(("call", "error", "message", "given"), CASES.values(), ids=CASES.keys())
def test_the_argument_is_named(call: Callable[[Any], object], error: type[Exception], message: str, given: tuple):
    for it in given:
        with pytest.raises(error) as caught:
            call(it)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_module_named_as_a_python_keyword_is_swapped_and_never_traced():
    """fx would write self.class(x)."""
    layers = {"class": torch.nn.Conv2d(3, 4, 3, padding=1), "a": torch.nn.ReLU(), "b c": torch.nn.ReLU()}
    model = torch.nn.Sequential()
    for name, layer in layers.items():
        model.add_module(name, layer)
    message = "'class' in the path 'class' is a Python keyword"
    with pytest.warns(UserWarning, match=message):
        shared = convert(model, SIZE, 256)
    assert [site.leader for site in Plan.of(shared, SIZE)] == [None, None]
    with pytest.raises(PlanError, match=message):
        merge_linear(model, SIZE)
