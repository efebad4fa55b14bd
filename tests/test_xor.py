"""The checkerboard with one gate: eq. 4 is exact, networks of one call share nothing, the methods part."""

import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from deepshare.analysis import xor

pytestmark = pytest.mark.usefixtures("one_thread")

SHARED, RELU, SNL, WITHOUT = xor.METHODS


def test_the_example_shows_equation_4(capsys: pytest.CaptureFixture[str]):
    runpy.run_path(str(Path(__file__).resolve().parents[1] / "examples" / "xor.py"))
    *rows, last = capsys.readouterr().out.splitlines()
    assert last == "400 of 400 points are right, with one gate"
    assert rows == [" ".join("....." + "#####")] * 5 + [" ".join("#####" + ".....")] * 5


def constructed(networks: xor.Networks, method: int, seed: int) -> None:
    """Eq. 4's weights in one of the networks."""
    with torch.no_grad():
        networks.weight_1[method, :, seed] = torch.tensor([1.0, 0.0])
        networks.weight_2[method, :, seed] = torch.tensor([0.0, 1.0])
        networks.bias[method, :, seed] = 0
        networks.alpha[method, 1, seed], networks.beta[method, 1, seed] = -2.0, 1.0
        networks.out[method, :, seed] = torch.tensor([0.0, 1.0])
        networks.out_bias[method, seed] = 0


def test_the_networks_hold_the_constructive_solution():
    networks = xor.Networks(xor.METHODS, [0, 1, 2])
    constructed(networks, 3, 1)
    accuracies = networks.accuracies()
    assert accuracies[3, 1] == 1
    assert (accuracies == 1).sum() == 1
    points = xor.grid(20)
    expected = -points[:, 0].sign() * points[:, 1]
    assert torch.equal(networks.decide(20)[:, 3, 1], expected)


def test_each_method_is_the_network_it_says():
    networks = xor.Networks(xor.METHODS, [7])
    points = torch.randn(50, 1, 2)
    hard = networks(points)[..., 0]

    def hidden(method: int) -> torch.Tensor:
        first = torch.stack([networks.weight_1[method, :, 0], networks.weight_2[method, :, 0]])
        return points[:, 0] @ first + networks.bias[method, :, 0]

    for method in range(4):
        h, out = hidden(method), networks.out[method, :, 0]
        gate = (h[:, :1] >= 0).float()
        second = {"one ReLU neuron": 0 * h[:, 1], SNL.name: h[:, 1]}.get(xor.METHODS[method].name, h[:, 1] * gate[:, 0])
        wanted = h[:, 0].relu() * out[0] + second * out[1] + networks.out_bias[method, 0]
        torch.testing.assert_close(hard[:, method], wanted)


def test_the_soft_gates_are_those_of_the_gelu_phase_alone():
    networks, points = xor.Networks(xor.METHODS, [0, 1]), torch.randn(30, 2, 2)
    hard, one, both = (networks(points, soft, 2.0) for soft in (0, 1, 2))
    assert not torch.equal(hard[:, 0], one[:, 0])
    assert not torch.equal(one[:, 0], both[:, 0])
    assert torch.equal(hard[:, 1:], both[:, 1:])
    (gradient,) = torch.autograd.grad(both[:, 0].sum(), networks.weight_1)
    assert (gradient[1:] == 0).all()


def test_a_network_does_not_know_who_trains_beside_it():
    together = xor.train(xor.METHODS, [3, 4, 5], 8)
    alone = xor.train(xor.METHODS[:1], [4], 8)
    for name, value in alone.named_parameters():
        torch.testing.assert_close(together.get_parameter(name)[:1, ..., 1:2], value, rtol=1e-4, atol=1e-5)


def test_what_is_not_learned_stays():
    networks = xor.train(xor.METHODS, [0, 1], 4)
    for place, method in enumerate(xor.METHODS):
        alpha, beta = torch.tensor(method.affine).unbind(1)
        kept = torch.equal(networks.alpha[place, :, 0], alpha) and torch.equal(networks.beta[place, :, 1], beta)
        assert kept is not method.learns_affine
    assert (networks.out[1, 1] == 0).all()
    assert (networks.out[[0, 2, 3], 1] != 0).all()


def test_the_gates_turn_hard_replicates_first():
    schedule = xor.Schedule()
    steps = [schedule.soft_neurons(epoch / 370) for epoch in range(370)]
    assert [steps.count(soft) for soft in (2, 1, 0)] == [100, 150, 120]  # Table 7
    assert steps == sorted(steps, reverse=True)


def test_the_order_of_methods_is_checked():
    with pytest.raises(ValueError, match="GELU phase must come first"):
        xor.train(xor.METHODS[::-1], [0], 1)


def test_training_repeats_and_measures():
    first, second = (xor.measure([0, 1], 3, side=10) for _ in range(2))
    assert first == second
    first.check()
    for method in first.methods:
        assert method.best_seed == method.accuracies.index(max(method.accuracies))
        assert method.solved == sum(accuracy > first.solved_above for accuracy in method.accuracies)
    cut = replace(first.methods[0], decision=first.methods[0].decision[1:])
    with pytest.raises(ValueError, match=r"wanted \(2, 100\) accuracies and decisions, got \(2, 99\)"):
        replace(first, methods=(cut, *first.methods[1:])).check()
    with pytest.raises(ValueError, match="methods: wanted DeepShare with"):
        replace(first, methods=first.methods[:1]).check()


def test_a_fiftieth_of_the_run_already_parts_the_methods():
    accuracies = xor.train(xor.METHODS, range(4), 100).accuracies()
    assert accuracies[0].max() > xor.SOLVED
    assert accuracies[1].max() < 2 / 3 + 0.01  # a half plane
    assert accuracies[2].max() < 5 / 6 + 0.01  # a strip along the diagonal
