"""The networks of a run: its plan, its students fresh from a seed, and how soft their gates are."""

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from deepshare import budget, models
from deepshare.methods import deepreduce, snl
from deepshare.methods.relu_reuse import relu_reuse
from deepshare.nn import SharedReLU2d
from deepshare.plan import Plan, PlanError, apply_plan
from deepshare.train.errors import RecipeError
from deepshare.train.fields import plain
from deepshare.train.plan_recipe import PlanRecipe
from deepshare.train.recipe import Recipe
from deepshare.train.recipe_parts import ModelRecipe
from deepshare.train.schedule import soft_channels_at
from deepshare.train.seeds import cpu_seed, derive


def model_spec(model: ModelRecipe, num_classes: int, input_size: Sequence[int]) -> dict[str, Any]:
    """The model in the form checkpoints carry it, for images (C, H, W): what is as published stays out."""
    shape = {
        "multipliers": model.multipliers,
        "blocks": model.blocks,
        "rho": None if model.rho == 1 else model.rho,
        "reuse": plain(model.reuse),
        "channels": model.channels,
    }
    return {
        "name": model.name,
        "num_classes": num_classes,
        "width": model.width,
        "stem_relu": model.stem_relu,
        "in_channels": input_size[0],
        "input_size": list(input_size),
        **{
            key: list(value) if isinstance(value, tuple) else value for key, value in shape.items() if value is not None
        },
    }


def spec_of(recipe: Recipe, spec: dict[str, Any], kind: str) -> dict[str, Any]:
    """The spec of the network that the phase `kind` trains; `spec` is the run's."""
    model = recipe.model_of(kind)
    return spec if model == recipe.model else model_spec(model, spec["num_classes"], spec["input_size"])


def make_plan(recipe: Recipe, spec: dict[str, Any], known: Plan | None = None) -> Plan:
    """The plan of the recipe's hard network; with method "snl", the plan its masks start from.

    A budget above what the groups can take gives P = C everywhere: the run's log says what was reached. One above the
    network's ReLUs is refused.

    known: the plan that a run to be resumed began with; the file it came from is not read again.

    Raises RecipeError: no such model, a budget below the floor or above the ReLUs (of SNL: not below them), weights
    that do not fit the number of sites, a plan's file that cannot be read or is for another model.
    """
    wanted = recipe.plan
    if wanted.counts_of is not None:
        raise RecipeError(
            f"recipe {recipe.name}: plan.counts_of: the DReLUs per site of {wanted.counts_of} come from a run of it: "
            f"`deepshare reproduce {recipe.name}` makes one; or give --set plan.weights_from=RUN/plan.json"
        )
    try:
        if wanted.method == "stages":
            return stages_plan(spec, wanted.culled or (), wanted.thinned or ())
        found = Plan.of(models.shapes_only(spec), tuple(spec["input_size"]))
        if wanted.method in ("uniform", "weights"):
            return _share(found, wanted)
        plan = found if wanted.file is None else known or Plan.load(wanted.file)
        plan.check_fits(found)
        if recipe.snl is not None and wanted.budget is not None and known is None:
            snl.check_budget(plan, wanted.budget, recipe.snl.granularity)
        return plan
    except (ValueError, OSError) as error:
        raise RecipeError(f"recipe {recipe.name}: {error}") from error


def stages_plan(spec: dict[str, Any], culled: Sequence[str], thinned: Sequence[str]) -> Plan:
    """Every ReLU but those of the stages `culled`, and of `thinned` the second of each two (DeepReDuce, DeepReShape).

    Where the spec has ReLU-reuse, it is for the ReLUs that are left: each moves into the convolution in front of it.

    Raises PlanError: no such stage; or ReLU-reuse in other convolutions than those in front of what is left.
    """
    size, reuse = tuple(spec["input_size"]), spec.get("reuse")
    plain = {key: value for key, value in spec.items() if key != "reuse"}
    model = models.shapes_only(plain)
    plan = deepreduce.thin(plain, deepreduce.cull(plain, Plan.of(model, size), culled), thinned)
    if reuse is None:
        return plan
    moved = relu_reuse(model, plan, reuse["factor"], form=reuse["form"], shortcuts=reuse["shortcuts"])
    if set(moved.settings["layers"]) != set(reuse["layers"]):
        wanted = ", ".join(moved.settings["layers"])
        raise PlanError(f"model.reuse.layers: wanted those in front of the ReLUs that are left, {wanted}")
    return moved.plan


def _share(found: Plan, wanted: PlanRecipe) -> Plan:
    assert wanted.budget is not None  # PlanRecipe requires it for every method that shares
    if wanted.budget > found.drelus:
        raise budget.BudgetError(
            f"plan.budget: wanted at most the {found.drelus:,} ReLUs of the network, got {wanted.budget:,}"
        )
    return budget.allocate(
        found, "uniform" if wanted.weights is None else wanted.weights, wanted.budget, group=wanted.group
    ).plan


def teacher_plan(plan: Plan) -> Plan:
    """GELU at every site (DeepShare appendix B: "a standard model with GELU activations as the teacher")."""
    return plan.replace_all("gelu")


def pretrain_plan(recipe: Recipe, plan: Plan) -> Plan:
    """What SNL's masks start from, linear sites included; for every other method a ReLU at every site."""
    return plan if recipe.plan.method == "snl" else plan.replace_all("relu")


def first_plan(recipe: Recipe, plan: Plan, kind: str) -> Plan:
    """What stands at the sites of the network that a phase begins with; `plan` is the run's.

    After SNL's masks, finetune has what they found instead.
    """
    if recipe.model_of(kind) != recipe.model:
        spec = model_spec(recipe.model_of(kind), 2, plan.input_size)  # the plan is the same for any number of classes
        plan = Plan.of(models.shapes_only(spec), plan.input_size)
        return plan.replace_all("gelu" if kind == "teacher" else "relu")
    if kind == "teacher":
        return teacher_plan(plan)
    return pretrain_plan(recipe, plan) if kind == "pretrain" else plan


def fresh(recipe: Recipe, spec: dict[str, Any], plan: Plan, phase: str) -> nn.Module:
    """A new network for `phase` with the plan's activations; weights from the recipe's seed alone."""
    with cpu_seed(derive(recipe.seed, "init", phase)):
        model = apply_plan(_create(spec), plan)
    for gate in shared_gates(model):
        gate.gamma.fill_(recipe.plan.gamma)
    if recipe.plan.affine and recipe.plan.affine_start == "uniform":
        with cpu_seed(derive(recipe.seed, "affine", phase)):
            _spread_affine(model)
    return model


def _spread_affine(model: nn.Module) -> None:
    """alpha and beta from U(-1, 1): a depthwise 1x1 convolution's default, and what DeepShare's appendix E hints at."""
    for gate in shared_gates(model):
        nn.init.uniform_(gate.alpha, -1, 1)
        nn.init.uniform_(gate.beta, -1, 1)


def shared_gates(model: nn.Module) -> Iterator[SharedReLU2d]:
    """Every SharedReLU2d of the model."""
    return (module for module in model.modules() if isinstance(module, SharedReLU2d))


def freeze_affine(model: nn.Module) -> None:
    """Leave alpha and beta at what they are (recipe key plan.affine = false)."""
    for gate in shared_gates(model):
        gate.alpha.requires_grad_(False)
        gate.beta.requires_grad_(False)


def soften(model: nn.Module) -> None:
    """Every gate soft: the GELU phase."""
    for gate in shared_gates(model):
        gate.soft_channels = gate.channels


def switch(model: nn.Module, epoch: int, switching: int) -> None:
    """The state of `epoch` in the switch: at every site at once, the same share of channels is hard."""
    for gate in shared_gates(model):
        gate.soft_channels = soft_channels_at(epoch, switching, gate.channels)


def soft_channels(model: nn.Module) -> int:
    """Channels with soft gates, over all sites."""
    return sum(gate.soft_channels for gate in shared_gates(model))


def hard_drelus(model: nn.Module, plan: Plan) -> int:
    """DReLUs the model pays now: only gates that are hard already, each prototype element once.

    The hard channels are the last C - soft_channels of a site; under the balanced map c mod P they use
    min(P, C - soft_channels) different prototypes. Sites of equal C switch together.
    """
    soft = {gate.channels: gate.soft_channels for gate in shared_gates(model)}
    total = 0
    for site in plan.sites:
        if site.prototypes is not None:
            total += min(site.prototypes, site.channels - soft[site.channels]) * site.positions
        elif site.kind != "gelu":
            total += site.drelus
    return total


def _create(spec: dict[str, Any]) -> nn.Module:
    return models.create(**{key: value for key, value in spec.items() if key != "input_size"})
