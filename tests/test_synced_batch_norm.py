"""The twin of a network whose batch norms are synced. What synced norms compute: tests/test_distributed.py."""

import pytest
import torch
from torch import Tensor, nn

from deepshare.train.synced_batch_norm import SyncedBatchNorm2d, synced

CPU = torch.device("cpu")


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
    twin = synced(model, CPU)
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


def test_on_a_gpu_the_twin_has_torchs_own_norms():
    model = Nested()
    twin = synced(model, torch.device("cuda"))
    assert isinstance(twin.body[1], nn.SyncBatchNorm)
    assert twin.body[1].weight is model.body[1].weight
    assert twin.body[1].running_var is model.body[1].running_var
    assert type(model.body[1]) is nn.BatchNorm2d


def test_a_network_without_norms_is_its_own_twin():
    model = nn.Sequential(nn.Linear(2, 2))
    assert synced(model, CPU) is model


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(2, momentum=None), nn.BatchNorm2d(2, track_running_stats=False)])
def test_a_norm_without_a_moving_average_is_refused(norm: nn.BatchNorm2d):
    with pytest.raises(ValueError, match="moving average"):
        synced(nn.Sequential(norm), CPU)
