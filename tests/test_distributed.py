"""Two processes that train one network: their meeting, their gradients, their norms."""

import os
import signal
from typing import Any

import pytest
import torch
from rank_runs import run_ranks
from torch import Tensor, nn
from torch.nn import functional as F

from deepshare import budget, models
from deepshare.data import DataError
from deepshare.fuse import fuse
from deepshare.nn import LearnedMask, SharedReLU2d
from deepshare.plan import Plan, apply_plan
from deepshare.train import (
    RecipeError,
    TrainingError,
    TrainingPaused,
)
from deepshare.train.distributed import Ranks, is_told_elsewhere, joined
from deepshare.train.synced_batch_norm import synced

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")


def meet() -> dict[str, object]:
    """What ranks say to each other, in two groups one after the other."""
    with joined("cpu") as ranks:
        assert joined("cpu").__enter__() is ranks
        found = {
            "share": ranks.share,
            "writer": ranks.from_writer(lambda: {"of": ranks.rank}),
            "total": ranks.total(torch.tensor([ranks.rank + 1, 2**40])).tolist(),
            "mean": ranks.mean(0.1 + ranks.rank),
            "late": ranks.from_writer(lambda: [ranks.not_yet(), ranks.not_yet(), 7][-1]),
        }
    with joined("cpu") as ranks:
        assert ranks.agree(lambda: ranks.rank) == ranks.rank
        for failing, error in ((1, RecipeError("of rank 1")), (0, DataError("of rank 0")), (1, OSError(5, "disk"))):
            with pytest.raises(type(error), match=str(error)[-6:]) as caught:
                ranks.agree(lambda: fail(error) if ranks.rank == failing else None)  # noqa: B023
            assert is_told_elsewhere(caught.value) == (ranks.rank == 1)
        with pytest.raises((UnicodeDecodeError, TrainingError), match="invalid start byte"):  # made otherwise
            ranks.from_writer(lambda: b"\xff".decode())
        with pytest.raises(TrainingPaused, match="paused in gelu after epoch 2 of 9, 12 epochs are left") as paused:
            ranks.from_writer(lambda: fail(TrainingPaused("gelu", 2, 9, 12)))
        assert paused.value.left == 12
    return found


def fail(error: Exception) -> None:
    raise error


def test_ranks_agree_count_and_meet_again():
    first, second = (ended.value or pytest.fail(str(ended.error)) for ended in run_ranks(2, meet))
    assert (first["share"], second["share"]) == ((0, 2), (1, 2))
    for found in (first, second):
        assert found["writer"] == {"of": 0}
        assert found["total"] == [3, 2**41]
        assert found["mean"] == pytest.approx(0.6, abs=1e-15)
        assert found["late"] == 7
    assert first["mean"] == second["mean"]


def leave_early(how: str) -> None:
    with joined("cpu") as ranks:
        ranks.mean(1.0)
        if ranks.rank == 1:
            {"dies": lambda: os.kill(os.getpid(), signal.SIGKILL), "hangs": lambda: signal.sigtimedwait([], 8)}[how]()
            return
        ranks.mean(1.0)


@pytest.mark.parametrize(("how", "seconds"), [("dies", 30), pytest.param("hangs", 2, marks=pytest.mark.slow)])
def test_a_rank_that_is_gone_is_named(how, seconds):
    alive, gone = run_ranks(2, leave_early, how, seconds=seconds)
    assert alive.error is not None
    if how == "dies":
        assert "TrainingError: rank 1 is gone (seen by rank 0 of 2); the run can be resumed" in alive.error
        assert gone.exitcode == -signal.SIGKILL
    else:  # it beats all the while: nobody is gone, but the collective timed out
        assert "TrainingError: rank 0 of 2 lost the others" in alive.error


# --- gradients -------------------------------------------------------------------------------------------------------


def network(kind: str) -> nn.Module:
    """A narrow ResNet18 in float64 whose gates are as in a phase of training."""
    torch.manual_seed(0)
    spec = {"name": "resnet18", "num_classes": 10, "width": 4, "in_channels": 1}
    plan = Plan.of(models.create(**spec), (1, 8, 8))
    if kind == "masks":
        model = models.create(**spec)
        for site in plan.sites:
            parent, _, name = site.name.rpartition(".")
            mask = LearnedMask(site.shape)
            mask.mask.data.uniform_(0, 1)
            setattr(model.get_submodule(parent), name, mask)
        return model.double()
    model = apply_plan(models.create(**spec), budget.allocate(plan, "uniform", 300, group="auto").plan)
    for gate in (module for module in model.modules() if isinstance(module, SharedReLU2d)):
        gate.alpha.data.uniform_(0.5, 1.5)
        gate.beta.data.uniform_(-0.5, 0.5)
        gate.soft_channels = gate.channels // 2 if kind == "switching" else 0
        if kind == "frozen":
            gate.requires_grad_(False)
    return model.double()


def gradients(kind: str, ranks: Ranks, *, sync: bool = True) -> dict[str, Tensor]:
    """Of two steps over 16 images, of which this rank has its part; and the running statistics after them."""
    model = network(kind)
    forward = ranks.parallel(fuse(model, (1, 8, 8)), sync_batch_norm=sync)
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(2, 16, 1, 8, 8, generator=generator, dtype=torch.float64)
    labels = torch.randint(10, (2, 16), generator=generator)
    part = slice(16 * ranks.rank // ranks.world, 16 * (ranks.rank + 1) // ranks.world)
    forward.train()
    for step in range(2):
        F.cross_entropy(forward(images[step, part]), labels[step, part]).backward()
    if not sync:
        ranks.take_buffers(model)
    found = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    return found | {name: value for name, value in model.state_dict().items() if "running" in name}


KINDS = ("switching", "hard", "frozen", "masks")


def gradients_of_rank() -> dict[str, dict[str, bytes]]:
    with joined("cpu") as ranks:
        found = {kind: gradients(kind, ranks) for kind in KINDS}
        found["not synced"] = gradients("hard", ranks, sync=False)
        return {kind: {name: value.numpy().tobytes() for name, value in of.items()} for kind, of in found.items()}


def doubles(content: bytes, like: Tensor) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.float64).view_as(like)


def test_two_ranks_have_the_gradients_of_one_process():
    first, second = (ended.value or pytest.fail(str(ended.error)) for ended in run_ranks(2, gradients_of_rank))
    assert first == second  # to the bit
    for kind in KINDS:
        alone = gradients(kind, Ranks())
        assert alone.keys() == first[kind].keys()
        learned = any(name.endswith(("alpha", "beta", "mask")) for name in alone)
        assert learned == (kind != "frozen")
        for name, value in alone.items():  # sums of some thousand float64 values in another order
            torch.testing.assert_close(doubles(first[kind][name], value), value, rtol=1e-9, atol=1e-12)
    one = gradients("hard", Ranks())["conv1.weight"]
    apart = doubles(first["not synced"]["conv1.weight"], one)
    assert (apart - one).abs().max() > 0.01 * one.abs().max()


# --- batch norms -----------------------------------------------------------------------------------------------------

SHARES = ([0, 1, 2, 3, 4], [5, 6, 7])  # unequal: each image counts as much, whoever has it
SHAPE = (8, 3, 5, 4)


def norm_case(dtype: torch.dtype) -> tuple[nn.BatchNorm2d, Tensor, Tensor]:
    """A norm with a history, images whose mean is far from 0, and what their outputs are multiplied with."""
    generator = torch.Generator().manual_seed(0)
    norm = nn.BatchNorm2d(3).to(torch.promote_types(dtype, torch.float32))
    for value, start in ((norm.weight, 1), (norm.bias, 0), (norm.running_mean, 0), (norm.running_var, 1)):
        value.data.copy_(start + 0.2 * torch.rand(3, generator=generator))
    x = (3 * torch.randn(SHAPE, generator=generator) + torch.tensor([0.0, 30, -5]).view(3, 1, 1)).to(dtype)
    factors = torch.randn(SHAPE, generator=generator).to(dtype)
    return norm, x.contiguous(memory_format=torch.channels_last), factors


def norm_outcome(norm: nn.BatchNorm2d, module: nn.Module, x: Tensor, factors: Tensor) -> dict[str, Tensor]:
    x = x.detach().requires_grad_()
    y = module(x)
    (y * factors).sum().backward()
    names = ("running_mean", "running_var", "num_batches_tracked")
    gradients = {"dx": x.grad, "dweight": norm.weight.grad, "dbias": norm.bias.grad}
    return {"y": y.detach(), **gradients, **{name: getattr(norm, name) for name in names}}


def as_doubles(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def norms_of_rank(dtypes: list[torch.dtype]) -> list[dict[str, list[float]]]:
    found = []
    with joined("cpu") as ranks:
        for dtype in dtypes:
            norm, x, factors = norm_case(dtype)
            rows = SHARES[ranks.rank]
            outcome = norm_outcome(norm, synced(norm, CPU), x[rows], factors[rows])
            assert outcome["y"].is_contiguous(memory_format=torch.channels_last)
            assert outcome["y"].dtype == outcome["dx"].dtype == dtype
            found.append({name: value.tolist() for name, value in outcome.items()})
    return found


def test_a_synced_norm_computes_what_one_norm_does_on_all_images():
    # float32: means of 160 values are 10 deviations from 0, which costs a digit; nn.BatchNorm2d itself is as far off.
    # bfloat16 (7 bits): y and dx are rounded once, of sums in float32
    tolerances = {torch.float32: 2e-5, torch.float64: 1e-12, torch.bfloat16: 2**-7}
    ended = [of.value or pytest.fail(str(of.error)) for of in run_ranks(2, norms_of_rank, list(tolerances))]
    for parts, (dtype, tolerance) in zip(zip(*ended, strict=True), tolerances.items(), strict=True):
        norm, x, factors = norm_case(dtype)
        whole = norm_outcome(norm, norm, x, factors)
        joint = {name: as_doubles([part[name] for part in parts]).sum(0) for name in ("dweight", "dbias")}
        for name in ("y", "dx"):
            joint[name] = torch.cat([as_doubles(part[name]) for part in parts])
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            assert parts[0][name] == parts[1][name]
            joint[name] = as_doubles(parts[0][name])
        for name, value in whole.items():
            torch.testing.assert_close(joint[name], value.double(), rtol=tolerance, atol=tolerance)


# --- whole runs ------------------------------------------------------------------------------------------------------
