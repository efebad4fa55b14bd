"""torch.compile of the student: one compilation for soft gates, one for hard ones, whatever the switch does between."""

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from deepshare.data import Batch
from deepshare.fuse import fuse
from deepshare.nn import SharedReLU2d
from deepshare.train import networks
from deepshare.train.compute import Compute
from deepshare.train.step import TrainingStep
from deepshare.train.task import HardLabels

COMPILED = Compute(torch.device("cpu"), bf16=False, channels_last=True, graph=False, compile=True)


@pytest.mark.slow
@pytest.mark.timeout(900)  # Inductor, on a machine with other work
def test_the_switch_compiles_nothing_anew_but_once_at_its_end():
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 8, 3), SharedReLU2d(8, 2), nn.Conv2d(8, 8, 3), SharedReLU2d(8, 4), nn.Flatten())
    model = nn.Sequential(*layers, nn.Linear(8 * 16, 5))
    step = TrainingStep(fuse(model, (3, 8, 8)), HardLabels(), torch.optim.SGD(model.parameters(), lr=0.01), COMPILED)
    batch = Batch(torch.randn(4, 3, 8, 8), torch.arange(4), torch.arange(4))
    networks.soften(model)
    graphs = []
    for epoch in range(9):
        networks.switch(model, epoch, 8)
        step.set_learning_rate(0.01 / (epoch + 1))
        assert step(batch).isfinite()
        graphs.append(counters["stats"]["unique_graphs"])
    assert [gate.is_hard for gate in networks.shared_gates(model)] == [True, True]
    assert graphs == [1] * 7 + [2] * 2
    assert not counters["graph_break"]
