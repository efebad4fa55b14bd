"""The phase "masks": SNL's Algorithm 1, from a network with its ReLUs to one with the budget's (docs/snl.md)."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from deepshare.checkpoint import load_checkpoint
from deepshare.methods import snl
from deepshare.nn import LearnedMask, MaskedReLU2d
from deepshare.plan import Plan, apply_plan
from deepshare.train import networks
from deepshare.train.checkpoints import State
from deepshare.train.errors import TrainingError
from deepshare.train.phase_keeper import PhaseKeeper
from deepshare.train.phase_recipe import PhaseRecipe
from deepshare.train.phases import phase_task, resumed_optimizer, save_network, train_one_epoch
from deepshare.train.rows import Row
from deepshare.train.run import Run
from deepshare.train.step import training_step
from deepshare.train.task import WithLasso


@dataclass(frozen=True)
class LassoState:
    """Where Algorithm 1 is: lambda of the epoch to come, the last count of ReLUs, the lowest one so far."""

    lasso: float
    count: int
    lowest: int

    def after_epoch(self, settings: snl.SNLSettings, count: int) -> "LassoState":
        lasso = settings.next_lasso(self.lasso, count, self.lowest)
        return LassoState(lasso, count, min(self.lowest, count))


def run_masks(run: Run, phase: PhaseRecipe, state: State) -> None:
    """Algorithm 1 on from `state`: epochs of Adam on weights and masks until the count is at the budget.

    A checkpoint is the network as it would be if line 11 came now: its weights, and a plan with the
    masks above epsilon; the masks themselves are in the state. After `phase.epochs` epochs the phase ends too: with
    snl.exact the largest masks stay then, and the log says how many were above epsilon.

    Raises TrainingError: the loss is not finite, or without snl.exact the count is still above the budget.
    TrainingPaused: the time of this call is over.
    """
    settings, budget = run.recipe.snl, run.recipe.plan.budget
    assert settings is not None
    assert budget is not None  # as Recipe and PlanRecipe require of this method
    model, at = _student(run, phase, state, settings), _progress(run.plan, state, settings)
    masks = {site.name: _learned(model, site.name).mask for site in snl.mask_sites(run.plan)}
    optimizer = resumed_optimizer(model, phase, state)
    with_lasso = WithLasso(phase_task(run, phase), list(masks.values()), at.lasso)
    step = training_step(run.parallel(model), with_lasso, optimizer, run.compute)
    keeper = PhaseKeeper(run, phase, state, optimizer)
    while keeper.state.epoch < phase.epochs and at.count > budget:
        keeper.pause_in_time()
        with_lasso.coefficient.fill_(at.lasso)
        row = train_one_epoch(run, phase, run.plan, model, step, keeper.state.epoch)
        kept = snl.count_kept(run.plan, masks, settings.epsilon)
        row |= {"drelus": sum(kept.values()), "lasso": at.lasso, "site_drelus": " ".join(map(str, kept.values()))}
        at = at.after_epoch(settings, sum(kept.values()))
        write = partial(_save, run, model, masks, settings.epsilon, row)
        keeper.after_epoch(row, write, masks={"values": _values(masks), **vars(at)})
    run.progress.left -= phase.epochs - keeper.state.epoch
    _end(run, keeper, model, masks)


def _progress(plan: Plan, state: State, settings: snl.SNLSettings) -> LassoState:
    if state.masks is None:
        return LassoState(settings.lasso, plan.drelus, plan.drelus)
    return LassoState(**{key: value for key, value in state.masks.items() if key != "values"})


def _student(run: Run, phase: PhaseRecipe, state: State, settings: snl.SNLSettings) -> nn.Module:
    """The network with learned masks at its ReLU sites: as saved, or of ones on a pretrained or fresh network."""
    shapes = {site.name: snl.mask_shape(site, settings.granularity) for site in snl.mask_sites(run.plan)}
    values: Mapping[str, Tensor] = {name: torch.ones(shape) for name, shape in shapes.items()}
    ones = {name: value.bool() for name, value in values.items()}
    start = snl.plan_of(run.plan, ones, zero_out=settings.zero_out)
    if state.masks is not None:
        model, values = load_checkpoint(run.folder.checkpoints.weights(state)).model, state.masks["values"]
    elif phase.start == "pretrain":
        model = apply_plan(load_checkpoint(run.folder.phase_end("pretrain")).model, start)
    else:
        model = networks.fresh(run.recipe, run.spec, start, phase.kind)
    _learn(model, values)
    return run.compute.place(model.requires_grad_(True))


def _learn(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """A LearnedMask in the place of each MaskedReLU2d, which stand at the paths that are their sites' names."""
    for name, value in values.items():
        old = model.get_submodule(name)
        assert isinstance(old, MaskedReLU2d)
        new = LearnedMask(tuple(value.shape), zero_out=old.zero_out)
        new.mask.data.copy_(value)
        _put(model, name, new)


def _learned(model: nn.Module, path: str) -> LearnedMask:
    module = model.get_submodule(path)
    assert isinstance(module, LearnedMask)
    return module


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    model.get_submodule(parent).add_module(name, module)


def _values(masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: mask.detach().cpu().clone() for name, mask in masks.items()}


def _binary(run: Run, model: nn.Module, kept: Mapping[str, Tensor]) -> tuple[nn.Module, Plan]:
    """A copy of the network with these masks fixed, and its plan."""
    result = copy.deepcopy(model)
    for name, mask in kept.items():
        _put(result, name, MaskedReLU2d(mask, zero_out=_learned(result, name).zero_out).to(run.device))
    assert run.recipe.snl is not None
    return result, snl.plan_of(run.plan, kept, zero_out=run.recipe.snl.zero_out)


def _save(run: Run, model: nn.Module, masks: Mapping[str, Tensor], epsilon: float, row: Row, path: Path) -> None:
    binary, plan = _binary(run, model, snl.threshold(run.plan, masks, epsilon))
    save_network(run, binary, plan, row, path)


def _end(run: Run, keeper: PhaseKeeper, model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Line 11, and the network that finetune goes on from."""
    state = keeper.state
    settings, budget = run.recipe.snl, run.recipe.plan.budget
    assert settings is not None
    assert budget is not None
    above = sum(snl.count_kept(run.plan, masks, settings.epsilon).values())
    if not settings.exact and above > budget:
        keeper.save()
        run.ranks.agree(partial(_fail_above, above, state.epoch, budget))
    choose = (
        partial(snl.binarise, budget=budget) if settings.exact else partial(snl.threshold, epsilon=settings.epsilon)
    )
    binary, plan = _binary(run, model, choose(run.plan, masks))
    accuracy = run.accuracy(binary, "val")
    shown = "none" if accuracy is None else f"{100 * accuracy:.2f} %"
    run.progress.say(
        f"masks: {above:,} of {run.plan.drelus:,} above {settings.epsilon:g} after {state.epoch} epochs; "
        f"{plan.drelus:,} stay, {budget:,} asked; val {shown} as they are fixed"
    )
    row = {**state.rows[-1], "val_accuracy": accuracy}
    keeper.end(partial(save_network, run, binary, plan, row))


def _fail_above(above: int, epochs: int, budget: int) -> None:
    raise TrainingError(
        f"masks: {above:,} ReLUs are left after {epochs} epochs, {budget:,} are wanted; "
        "raise phase.masks.epochs or snl.lasso, or set snl.exact"
    )
