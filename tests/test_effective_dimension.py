"""Effective dimension of gates: the identity behind it, its limits, and the hooks that see a network's own gates."""

import pytest
import torch
from torch import Tensor, nn

from deepshare import models
from deepshare.analysis import effective_dimension
from deepshare.analysis.effective_dimension import gate_dimensions
from deepshare.plan import PlanError


class Passing(nn.Module):
    """An nn.ReLU whose inputs are the images, so that a test says which gates there are."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x)


def by_eigenvalues(gates: Tensor) -> list[float]:
    """PCA of [N, C, H*W] gates at each position: (sum l)^2 / sum l^2 / C."""
    found = []
    for vectors in gates.double().unbind(2):
        eigenvalues = torch.linalg.eigvalsh(torch.cov(vectors.T))
        found.append(float(eigenvalues.sum() ** 2 / eigenvalues.square().sum() / gates.shape[1]))
    return found


def test_it_is_the_pca_of_the_gates_whatever_the_batches():
    torch.manual_seed(0)
    mixed = torch.einsum("ncl,dc->ndl", torch.randn(50, 6, 12), torch.randn(6, 6)).reshape(50, 6, 3, 4)
    (found,) = gate_dimensions(Passing(), mixed, batch_size=50)
    (again,) = gate_dimensions(Passing(), mixed, batch_size=7)
    wanted = by_eigenvalues((mixed >= 0).flatten(2))
    assert (found.site, found.channels) == ("act", 6)
    torch.testing.assert_close(found.real.tolist(), wanted, rtol=1e-9, atol=0)
    assert torch.equal(found.real, again.real)
    assert max(wanted) < 1


def test_equal_channels_have_one_dimension_and_independent_ones_all():
    torch.manual_seed(0)
    one = torch.randn(400, 1, 2, 2).expand(-1, 5, -1, -1).contiguous()
    (same,) = gate_dimensions(Passing(), one)
    torch.testing.assert_close(same.real, torch.full((4,), 1 / 5, dtype=torch.float64))
    (free,) = gate_dimensions(Passing(), torch.randn(4000, 5, 2, 2))
    assert free.real.min() > 0.99


def test_shuffling_parts_what_only_positions_share():
    # channels agree at each position, positions know nothing of each other: 1 dimension, and nearly all once shuffled
    torch.manual_seed(0)
    (found,) = gate_dimensions(Passing(), torch.randn(500, 1, 8, 8).expand(-1, 4, -1, -1).contiguous())
    assert found.real.max() < 0.2501
    assert found.shuffled.min() > 0.95
    # every position of an image agrees: shuffling changes nothing
    (kept,) = gate_dimensions(Passing(), torch.randn(500, 1, 1, 1).expand(-1, 4, 8, 8).contiguous())
    assert torch.equal(kept.real, kept.shuffled)


def test_gates_that_never_change_add_nothing():
    torch.manual_seed(0)
    x = torch.randn(300, 4, 1, 2)
    x[:, 2:] = 1.0
    x[:, :, :, 1] = -1.0
    (found,) = gate_dimensions(Passing(), x)
    assert found.real[0] == pytest.approx(2 / 4, rel=0.01)
    assert found.real[1] == 0  # no gate changes there
    assert torch.isfinite(found.shuffled).all()


def test_a_gate_at_0_is_open():
    x = torch.tensor([0.0, -0.0, -1.0, 1.0]).reshape(4, 1, 1, 1)
    (found,) = gate_dimensions(Passing(), x)
    assert found.real.item() == pytest.approx(1)
    (never,) = gate_dimensions(Passing(), x.abs())
    assert never.real.item() == 0


def test_every_site_of_a_network_in_any_number_of_passes(monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    network = models.create("resnet18", num_classes=4, width=2).train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    images = torch.randn(40, 3, 16, 16)
    found = gate_dimensions(network, images, batch_size=16, seed=3)
    assert [one.site for one in found][:3] == ["layer1.0.relu1", "layer1.0.relu2", "layer1.1.relu1"]
    assert [one.real.numel() for one in found] == [256] * 4 + [64] * 4 + [16] * 4 + [4] * 4
    assert network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    monkeypatch.setattr(effective_dimension, "SUMS_AT_ONCE", 1)  # a pass for each site
    for one, other in zip(found, gate_dimensions(network, images, batch_size=16, seed=3), strict=True):
        assert torch.equal(one.real, other.real)
        assert torch.equal(one.shuffled, other.shuffled)


def test_a_relu_called_twice_is_two_sites():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.act(x) - 0.5)

    first, second = gate_dimensions(Twice(), torch.randn(64, 3, 2, 2))
    assert (first.site, second.site) == ("act", "act@2")
    assert not torch.equal(first.real, second.real)
    assert first.to_dict()["real"] == [round(value, 4) for value in first.real.tolist()]


def test_what_cannot_be_measured_is_refused():
    class Functional(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(x)

    with pytest.raises(PlanError, match="functional"):
        gate_dimensions(Functional(), torch.randn(4, 3, 2, 2))
    with pytest.raises(PlanError, match="no ReLU"):
        gate_dimensions(nn.Flatten(), torch.randn(4, 3, 2, 2))
    with pytest.raises(ValueError, match=r"N in 2\.\.2\^24 \(got \[1, 3, 2, 2\]\)"):
        gate_dimensions(Passing(), torch.randn(1, 3, 2, 2))


@pytest.mark.gpu
def test_a_gpu_counts_the_same_gates():
    torch.use_deterministic_algorithms(False)  # cuBLAS would ask for a workspace setting
    torch.manual_seed(0)
    images = torch.randn(300, 24, 5, 5)
    (here,), (there,) = gate_dimensions(Passing(), images), gate_dimensions(Passing(), images.cuda())
    torch.testing.assert_close(there.real, here.real, rtol=1e-12, atol=0)
    torch.testing.assert_close(there.shuffled, here.shuffled, rtol=0.1, atol=0)  # other permutations, as many
    assert not there.real.is_cuda
