"""The training step: captured and replayed it trains as it does eagerly, and it never makes the host wait."""

import copy
from collections.abc import Callable

import pytest
import torch
from tape import TapeRecorder
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from deepshare import data
from deepshare.data import Batch
from deepshare.fuse import fuse
from deepshare.nn import LearnedMask, SharedReLU2d
from deepshare.train import load_recipe, networks
from deepshare.train.compute import Compute
from deepshare.train.errors import TrainingError
from deepshare.train.loop import make_optimizer, train_epoch
from deepshare.train.recipe import Recipe
from deepshare.train.step import WARM_UP, CapturedStep, TrainingStep
from deepshare.train.task import Decoupled, Distillation, HardLabels, Task, WithLasso
from deepshare.train.teacher import KnownLogits, Network

CPU = Compute(torch.device("cpu"), bf16=False, channels_last=True, graph=False, compile=False)
KINDS = ("teacher", "gelu", "switch", "baseline", "masks", "finetune")
IMAGE = (1, 8, 8)
GATES = (nn.ReLU, SharedReLU2d, LearnedMask)
Hook = Callable[[nn.Module, tuple[Tensor, ...], dict[str, Tensor]], object]


@pytest.fixture(scope="module")
def digits() -> data.Dataset:
    return data.load("digits", limit=100)


def recipe_of(kind: str) -> Recipe:
    name = {"masks": "demo-snl-960", "baseline": "demo-relu"}.get(kind, "demo-240")
    return load_recipe(name, ["model.width=4", *(["plan.budget=120"] if name == "demo-240" else [])])


def student_of(kind: str) -> nn.Module:
    recipe = recipe_of(kind)
    spec = networks.model_spec(recipe.model, 10, IMAGE)
    plan = networks.make_plan(load_recipe("demo-relu", ["model.width=4"]) if kind == "masks" else recipe, spec)
    plan = networks.teacher_plan(plan) if kind == "teacher" else plan
    model = networks.fresh(recipe, spec, plan, kind)
    if kind in ("gelu", "switch"):
        networks.soften(model)
    if kind == "masks":
        for site in plan.sites:
            parent, _, name = site.name.rpartition(".")
            setattr(model.get_submodule(parent), name, LearnedMask(site.shape))
    return CPU.place(model)


def task_of(kind: str, student: nn.Module) -> Task:
    if kind in ("teacher", "baseline"):
        return HardLabels()
    teacher = Network(CPU.place_frozen(student_of("teacher")))
    divergence = {"divergence": Decoupled(1, 8)} if kind == "finetune" else {}
    task = Distillation(teacher, 4, 0.5, **divergence)
    masks = [module.mask for module in student.modules() if isinstance(module, LearnedMask)]
    return WithLasso(task, masks, 1e-3) if kind == "masks" else task


def step_of(kind: str, captured: bool) -> tuple[TrainingStep, nn.Module]:
    """The step, and the network whose gates are switched."""
    model = student_of(kind)
    forward = fuse(model, IMAGE)
    optimizer = make_optimizer(model, recipe_of(kind).phase_of(kind))

    def state() -> list[Tensor]:
        kept = [value for of in optimizer.state.values() for value in of.values() if isinstance(value, Tensor)]
        return [*model.parameters(), *model.buffers(), *kept]

    task = task_of(kind, model)
    if not captured:
        return TrainingStep(forward, task, optimizer, CPU), model
    return CapturedStep(forward, task, optimizer, CPU, TapeRecorder(state)), model


def train_epochs(step: TrainingStep, model: nn.Module, digits: data.Dataset, kind: str, epochs: int) -> list[float]:
    losses = []
    for epoch in range(epochs):
        step.set_learning_rate(2.0 ** -(6 + epoch))  # the same number in float32, as a captured step keeps it
        if kind == "switch":
            networks.switch(model, epoch, epochs - 1)
        if isinstance(step.task, WithLasso):
            step.task.coefficient.fill_(0.01 * (epoch + 1))
        batches = digits.batches("train", 16, augment=data.Augment(crop_padding=1), seed=epoch)
        losses.append(train_epoch(step, batches, lambda steps, total: None))
    return losses


@pytest.mark.parametrize("kind", ["gelu", "switch", "masks"])
def test_a_replayed_step_trains_as_an_eager_one(digits, kind):
    """Same losses and weights, bit for bit, while learning rate, soft channels and lambda change between epochs."""
    torch.set_num_threads(1)
    ended = []
    for captured in (False, True):
        step, model = step_of(kind, captured)
        losses = train_epochs(step, model, digits, kind, epochs=4)
        ended.append((losses, model.state_dict()))
    (eager_losses, eager), (losses, weights) = ended
    assert losses == eager_losses
    assert len(set(losses)) == 4
    assert [name for name, value in weights.items() if not torch.equal(value, eager[name])] == []
    once = ["run"] * WARM_UP + ["capture"]
    # 6 batches an epoch; in epoch 2 of the switch all gates are hard, and the step is recorded once more
    soft, hard = (12 - WARM_UP, 12 - WARM_UP) if kind == "switch" else (24 - WARM_UP, 0)
    wanted = [*once, *["replay"] * soft] + ([*once, *["replay"] * hard] if hard else [])
    assert step.recorder.calls == wanted


def test_a_step_that_cannot_be_captured_says_so(digits):
    step, _ = step_of("gelu", captured=True)
    batches = list(digits.batches("train", 16, seed=0))
    for batch in batches[:WARM_UP]:
        step(batch)

    def refuse(work: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    step.recorder.capture = refuse
    with pytest.raises(TrainingError, match=r"compute\.graph = false.*not permitted when stream is capturing"):
        step(batches[WARM_UP])


def test_a_captured_step_takes_batches_of_one_shape(digits):
    step, _ = step_of("gelu", captured=True)
    step(next(iter(digits.batches("train", 16, seed=0))))
    with pytest.raises(ValueError, match=r"\[16, 1, 8, 8\] \(got \[8, 1, 8, 8\]\)"):
        step(next(iter(digits.batches("train", 8, seed=0))))


class WaitsError(Exception):
    """An operation whose result the host would have to read."""


class NoWaiting(TorchDispatchMode):
    """Refuses what makes the host wait for a GPU: values read, sizes that depend on values."""

    READS = ("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "unique_dim")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func._schema.name.split("::")[1]
        if name in self.READS or (name.startswith("index") and _has_mask(args)):
            raise WaitsError(name)
        return func(*args, **(kwargs or {}))


def _has_mask(args: tuple[object, ...]) -> bool:
    indices = args[1] if len(args) > 1 and isinstance(args[1], list | tuple) else ()
    return any(isinstance(index, Tensor) and index.dtype == torch.bool for index in indices)


@pytest.mark.parametrize("kind", KINDS)
def test_no_step_makes_the_host_wait(digits, kind):
    """Augmentation and step of every kind of phase, after what is drawn before the first batch."""
    step, model = step_of(kind, captured=False)
    if kind == "switch":
        networks.switch(model, 1, 4)
    step.model.train()
    batches = iter(digits.batches("train", 16, augment=data.Augment(crop_padding=1, flip=True), seed=0))
    step(next(batches))
    with NoWaiting():
        for _ in range(2):
            step(next(batches))


def test_no_colour_makes_the_host_wait():
    images = torch.randint(256, (64, 3, 8, 8), dtype=torch.uint8)
    augment = data.Augment(brightness=0.1, contrast=0.1, saturation=0.1, hue=0.1)
    labels = torch.zeros(64, dtype=torch.int64)
    batches = iter(data.Batches(images, labels, 16, normalise=lambda unit: unit, augment=augment, seed=0))
    next(batches)
    with NoWaiting():
        next(batches)


def test_waiting_is_seen():
    x = torch.arange(3.0)
    for waits in (x.sum().item, lambda: x[x > 1], x.nonzero, lambda: bool(x[0] > 1), lambda: x.equal(x + 1)):
        with NoWaiting(), pytest.raises(WaitsError):
            waits()


def test_known_logits_are_what_the_teacher_says_of_a_batch(digits):
    """Bit for bit: on the CPU an image's logits depend neither on its place in a batch nor on the others."""
    torch.set_num_threads(1)
    teacher = Network(CPU.place_frozen(student_of("teacher")))
    known = KnownLogits(teacher, digits.batches("train", 16))
    for batch in digits.batches("train", 16, seed=3):
        assert torch.equal(known(batch), teacher(batch))
    loss = Distillation(known, 4, 0.5)(student_of("gelu"), batch)
    loss.backward()  # a table made in inference mode could not be saved for it


def half(**changes: bool) -> Compute:
    return Compute(**{**vars(CPU), "bf16": True, **changes})


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_trains_every_kind_of_phase(digits, kind):
    """Loss near float32's; weights, statistics and every gradient float32, alpha's, beta's and masks' among them."""
    batch: Batch = next(iter(digits.batches("train", 64, seed=0)))
    step, model = step_of(kind, captured=False)
    twin = copy.deepcopy(model)
    step.model.train()
    full = step(batch)
    halved = TrainingStep(fuse(twin, IMAGE), step.task, make_optimizer(twin, recipe_of(kind).phase_of(kind)), half())
    halved.model.train()
    loss = halved(batch)
    assert loss.dtype == torch.float32
    assert loss != full  # it is bfloat16 that was computed in
    torch.testing.assert_close(loss, full, rtol=0.02, atol=0.02)
    assert {value.dtype for value in twin.state_dict().values() if value.is_floating_point()} == {torch.float32}
    assert {value.grad.dtype for value in twin.parameters()} == {torch.float32}


def gradient(model: nn.Module, task: Task, batch: Batch, compute: Compute, hook: Hook | None = None) -> Tensor:
    """Of all parameters, flat; `hook` sees, and may change, what every gate is given."""
    gates = [module for module in model.modules() if isinstance(module, GATES)]
    hooks = [gate.register_forward_pre_hook(hook, with_kwargs=True) for gate in gates if hook is not None]
    with compute.autocast():
        loss = task(model.train(), batch)
    loss.backward()
    for handle in hooks:
        handle.remove()
    return torch.cat([value.grad.flatten() for value in model.parameters()])


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_gradients_are_those_of_float32_with_the_gates_bfloat16_saw(digits, kind):
    """A hard gate turns where a value is below bfloat16's rounding, 0.3 % of them here, and alone that takes the cosine
    to 0.90. float32, given bfloat16's values at those places, has bfloat16's gradient."""
    batch = next(iter(digits.batches("train", 64, seed=0)))
    model = student_of(kind)
    task, seen = task_of(kind, model), []

    def record(module, args, named):
        seen.append([value.detach().float() for value in (*args, *named.values())])

    def align(module, args, named):
        given = [*args, *named.values()]
        turned = [(value >= 0) != (other >= 0) for value, other in zip(given, seen[0], strict=True)]
        assert all(places.float().mean() < 0.05 for places in turned)
        replaced = [
            torch.where(places, value + (other - value).detach(), value)
            for places, value, other in zip(turned, given, seen.pop(0), strict=True)
        ]
        return tuple(replaced[: len(args)]), dict(zip(named, replaced[len(args) :], strict=True))

    halved = gradient(copy.deepcopy(model), task, batch, half(), record)
    full = gradient(model, task, batch, CPU, align)
    assert seen == []
    assert torch.cosine_similarity(halved, full, dim=0) > 0.99


def test_a_frozen_network_is_cast_once_to_what_autocast_makes_of_it(digits):
    batch = next(iter(digits.batches("train", 16, seed=0)))
    compute = half()
    with compute.autocast():
        cast = Network(CPU.place(student_of("teacher")))(batch)
        once = Network(compute.place_frozen(student_of("teacher")))(batch)
    assert torch.equal(cast, once)
    assert cast.dtype == torch.float32
