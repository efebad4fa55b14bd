"""One phase of a run, from its start or from where a kill left it, to its end on disk."""

import copy
import math
from functools import partial
from pathlib import Path

import torch
from torch import nn

from deepshare.checkpoint import load_checkpoint, save_checkpoint
from deepshare.data import Batches
from deepshare.fuse import fuse
from deepshare.plan import Plan
from deepshare.train import networks
from deepshare.train.checkpoints import State
from deepshare.train.errors import TrainingError
from deepshare.train.loop import make_optimizer, train_epoch
from deepshare.train.phase_keeper import PhaseKeeper
from deepshare.train.phase_recipe import PhaseRecipe
from deepshare.train.rows import Row
from deepshare.train.run import Run
from deepshare.train.seeds import derive
from deepshare.train.step import TrainingStep, training_step
from deepshare.train.task import Decoupled, Distillation, HardLabels, Task, kl
from deepshare.train.teacher import KnownLogits, Network, Teacher


def run_phase(run: Run, phase: PhaseRecipe, state: State) -> None:
    """Train `phase` on from `state` (State(phase) for its start) to its end.

    Raises TrainingError: the loss is no longer finite. TrainingPaused: the time of this call is over. What was saved
    before stays.
    """
    model, plan = _student(run, phase, state)
    optimizer = resumed_optimizer(model, phase, state)
    forward = run.parallel(fuse(model, plan.input_size))
    step = training_step(forward, phase_task(run, phase), optimizer, run.compute)
    keeper = PhaseKeeper(run, phase, state, optimizer)
    for epoch in range(state.epoch, phase.epochs):
        keeper.pause_in_time()
        row = train_one_epoch(run, phase, plan, model, step, epoch)
        keep = partial(_copy_writer, run, model, plan, row) if phase.keeps_best else None
        keeper.after_epoch(row, partial(save_network, run, model, plan, row), keep)
    keeper.end(partial(save_network, run, model, plan, keeper.state.rows[-1]))


def _copy_writer(run: Run, model: nn.Module, plan: Plan, row: Row) -> partial[None]:
    return partial(save_network, run, copy.deepcopy(model), plan, row)


def _student(run: Run, phase: PhaseRecipe, state: State) -> tuple[nn.Module, Plan]:
    """The network to train: from the last checkpoint, from the phase before, or fresh; ready to train. Its plan."""
    if state.epoch or phase.kind in ("switch", "finetune"):
        kinds = [other.kind for other in run.recipe.phase]
        before = run.folder.phase_end(kinds[kinds.index(phase.kind) - 1])
        saved = load_checkpoint(run.folder.checkpoints.weights(state) if state.epoch else before)
        model, plan = saved.model, saved.plan
    else:
        plan = networks.first_plan(run.recipe, run.plan, phase.kind)
        spec = networks.spec_of(run.recipe, run.spec, phase.kind)
        model = networks.fresh(run.recipe, spec, plan, phase.kind)
        if phase.kind == "gelu":
            networks.soften(model)
    model.requires_grad_(True)
    if not run.recipe.plan.affine:
        networks.freeze_affine(model)
    return run.compute.place(model), plan


def resumed_optimizer(model: nn.Module, phase: PhaseRecipe, state: State) -> torch.optim.Optimizer:
    """The phase's optimizer as `state` left it.

    What the recipe and the device decide is not taken from there: a run may go on on another device.
    """
    optimizer = make_optimizer(model, phase)
    if state.optimizer is not None:
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state.optimizer["state"], "param_groups": groups})
    return optimizer


def phase_task(run: Run, phase: PhaseRecipe) -> Task:
    """The loss of a phase, with its teacher where it has one."""
    if phase.distill == "none":
        return HardLabels()
    settings = run.recipe.distill
    teacher = _teacher(run, phase)
    decoupled = settings.alpha is not None and settings.beta is not None  # as DistillRecipe resolves them
    divergence = Decoupled(settings.alpha, settings.beta) if decoupled else kl  # type: ignore[arg-type]
    return Distillation(teacher, settings.temperature, settings.weight, divergence)


def _teacher(run: Run, phase: PhaseRecipe) -> Teacher:
    """The network a phase learns from; where augmentation changes no image, what it says of each is computed here."""
    network = Network(fuse(run.compute.place_frozen(run.end_of(phase.distill)), run.plan.input_size))
    if not run.recipe.data.augment.changes_nothing:
        return network
    with run.compute.autocast():
        return KnownLogits(network, run.dataset.batches("train", phase.batch_size))


def train_one_epoch(
    run: Run,
    phase: PhaseRecipe,
    plan: Plan,
    model: nn.Module,
    step: TrainingStep,  # of the same network in fewer passes
    epoch: int,
) -> Row:
    """Epoch number `epoch` (from 0) and its validation; returns its row of metrics."""
    if phase.kind == "switch":
        networks.switch(model, epoch, phase.epochs - phase.hold)
    lr = phase.learning_rate.at(epoch)
    step.set_learning_rate(lr)
    batches = _batches(run, phase, epoch)
    run.progress.start_epoch(phase.kind, epoch + 1, phase.epochs, len(batches), batches.image_count)
    loss = run.ranks.mean(train_epoch(step, batches, run.progress.after_step))
    seconds = run.progress.training_seconds()
    run.ranks.agree(partial(_check_loss, phase, epoch, loss, lr))
    run.unite_statistics(model)
    accuracy = validate(run, step.model)
    return {
        "phase": phase.kind,
        "epoch": epoch + 1,
        "loss": loss,
        "val_accuracy": accuracy,
        "lr": lr,
        "drelus": networks.hard_drelus(model, plan),
        "soft_channels": networks.soft_channels(model),
        "images_per_second": batches.image_count / seconds,
        "seconds": seconds,
    }


def validate(run: Run, model: nn.Module) -> float | None:
    """Accuracy on the validation split, in the precision that is trained in."""
    with run.compute.autocast():
        return run.accuracy(model, "val")


def _check_loss(phase: PhaseRecipe, epoch: int, loss: float, lr: float) -> None:
    if not math.isfinite(loss):
        raise TrainingError(
            f"{phase.kind}, epoch {epoch + 1}: the loss is {loss}; lower phase.{phase.kind}.lr (it was {lr:g} here)"
        )


def _batches(run: Run, phase: PhaseRecipe, epoch: int) -> Batches:
    return run.dataset.batches(
        "train",
        phase.batch_size,
        augment=run.recipe.data.augment,
        seed=derive(run.recipe.seed, "batches", phase.kind, epoch),
        share=run.ranks.share,
    )


def save_network(run: Run, model: nn.Module, plan: Plan, row: Row, path: Path) -> None:
    """The network after an epoch. Speeds stay out of the file: equal runs make equal files."""
    metrics = {key: row[key] for key in ("phase", "epoch", "loss", "val_accuracy")}
    spec = networks.spec_of(run.recipe, run.spec, str(row["phase"]))
    save_checkpoint(path, model, spec, plan, recipe=run.recipe.to_dict(), metrics=metrics)
