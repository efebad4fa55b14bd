"""Batch norms over two ranks' images against nn.BatchNorm2d over all of them."""

import pytest
import torch
from rank_runs import run_ranks
from torch import Tensor, nn

from deepshare.train.distributed import joined
from deepshare.train.synced_batch_norm import SyncedBatchNorm2d, synced

SHARES = ([0, 1, 2, 3, 4], [5, 6, 7])  # unequal: each image counts as much, whoever has it
SHAPE = (8, 3, 5, 4)


def case(dtype: torch.dtype, channels_last: bool) -> tuple[nn.BatchNorm2d, Tensor, Tensor]:
    """A norm with a history, images whose mean is far from 0, and what their outputs are multiplied with."""
    generator = torch.Generator().manual_seed(0)
    norm = nn.BatchNorm2d(3).to(dtype)
    for value, start in ((norm.weight, 1), (norm.bias, 0), (norm.running_mean, 0), (norm.running_var, 1)):
        value.data.copy_(start + 0.2 * torch.rand(3, generator=generator))
    x = (3 * torch.randn(SHAPE, generator=generator) + torch.tensor([0.0, 30, -5]).view(3, 1, 1)).to(dtype)
    factors = torch.randn(SHAPE, generator=generator).to(dtype)
    return norm, x.contiguous(memory_format=torch.channels_last) if channels_last else x, factors


def outcome(norm: nn.BatchNorm2d, module: nn.Module, x: Tensor, factors: Tensor) -> dict[str, Tensor]:
    x = x.detach().requires_grad_()
    y = module(x)
    (y * factors).sum().backward()
    names = ("running_mean", "running_var", "num_batches_tracked")
    gradients = {"dx": x.grad, "dweight": norm.weight.grad, "dbias": norm.bias.grad}
    return {"y": y.detach(), **gradients, **{name: getattr(norm, name) for name in names}}


def of_rank(dtype: torch.dtype, channels_last: bool) -> dict[str, Tensor]:
    norm, x, factors = case(dtype, channels_last)
    with joined("cpu") as ranks:
        rows = SHARES[ranks.rank]
        found = outcome(norm, synced(norm, torch.device("cpu")), x[rows], factors[rows])
        return {name: value.tolist() for name, value in found.items()} | {"strides": found["y"].stride()}


@pytest.mark.parametrize(("dtype", "channels_last"), [(torch.float32, True), (torch.float64, False)])
def test_two_ranks_compute_what_one_norm_does_on_all_images(dtype, channels_last):
    norm, x, factors = case(dtype, channels_last)
    whole = outcome(norm, norm, x, factors)
    parts = [ended.value for ended in run_ranks(2, of_rank, dtype, channels_last)]
    # float32: 160 values a channel, their mean 10 deviations from 0; the whole norm itself is this far from float64
    close = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 2e-5, "atol": 2e-5}
    for rank, part in enumerate(parts):
        for name in ("y", "dx"):
            torch.testing.assert_close(torch.tensor(part[name], dtype=dtype), whole[name][SHARES[rank]], **close)
        for name in ("running_mean", "running_var"):
            torch.testing.assert_close(torch.tensor(part[name], dtype=dtype), whole[name], **close)
        assert part["num_batches_tracked"] == 1
        assert part["strides"] == whole["y"].stride()
    for name in ("dweight", "dbias"):
        both = torch.tensor([part[name] for part in parts], dtype=dtype).sum(0)
        torch.testing.assert_close(both, whole[name], **close)
    assert [parts[0][name] for name in ("running_mean", "running_var")] == [
        parts[1][name] for name in ("running_mean", "running_var")
    ]


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU())
        self.head = nn.Linear(3, 2)
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3))) * self.scale


def test_a_twin_shares_all_but_the_class_of_its_norms():
    model = Nested()
    twin = synced(model, torch.device("cpu"))
    assert isinstance(twin.body[1], SyncedBatchNorm2d)
    assert type(model.body[1]) is nn.BatchNorm2d
    assert twin.head is model.head
    assert twin.body[0] is model.body[0]
    ours, theirs = model.state_dict(keep_vars=True), twin.state_dict(keep_vars=True)
    assert ours.keys() == theirs.keys()
    assert all(theirs[name] is value for name, value in ours.items())
    model.body[1].running_mean.fill_(7)
    x = torch.randn(2, 1, 5, 5)
    assert torch.equal(twin.eval()(x), model.eval()(x))


def test_a_norm_without_a_moving_average_is_refused():
    for norm in (nn.BatchNorm2d(2, momentum=None), nn.BatchNorm2d(2, track_running_stats=False)):
        with pytest.raises(ValueError, match="moving average"):
            synced(nn.Sequential(norm), torch.device("cpu"))
