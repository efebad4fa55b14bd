"""examples/xor.py: the constructive solution is exact, a short run works, the figures of a whole one hold (slow)."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from deepshare import SharedReLU2d

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "xor.py"


@pytest.fixture(scope="module")
def xor():
    spec = importlib.util.spec_from_file_location("xor_example", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as main() does: the tensors hold a few hundred numbers
    yield module
    torch.set_num_threads(threads)
    del sys.modules[spec.name]


def test_equation_4_solves_it_with_one_gate(xor):
    # W1 = identity, alpha_2 = -2, beta_2 = 1, output: the replicate
    act = SharedReLU2d(2, 1)
    assert act.prototypes == 1
    with torch.no_grad():
        act.alpha[1], act.beta[1] = -2.0, 1.0
    points = xor.grid(200)
    output = act(points.reshape(-1, 2, 1, 1))[:, 1, 0, 0]
    assert torch.equal((output > 0).float(), xor.labels_of(points))
    assert torch.equal(output, -points[:, 0].sign() * points[:, 1])


def test_the_example_holds_the_constructive_solution(xor):
    kind = xor.Kind("constructed", ((1.0, 0.0), (-2.0, 1.0)))
    networks = xor.Networks(kind, [0, 1])
    assert networks.channel_map.prototypes == 2  # one gate for each of two networks
    with torch.no_grad():
        networks.first.copy_(torch.eye(2).expand(2, 2, 2))
        networks.second.copy_(torch.tensor([[0.0], [1.0]]).expand(2, 2, 1))
        networks.first_bias.zero_()
        networks.second_bias.zero_()
    assert xor.accuracies(networks) == [1.0, 1.0]


def test_networks_of_other_seeds_share_nothing(xor):
    # the second of three networks is the one of its seed alone, gates and gradients included
    three, one = xor.Networks(xor.KINDS[2], [3, 4, 5]), xor.Networks(xor.KINDS[2], [4])
    points = torch.randn(3, 9, 2)
    for soft in (0, 1, 2):
        together, alone = three(points, soft), one(points[1:2], soft)
        torch.testing.assert_close(together[1], alone[0])
        gradient = torch.autograd.grad(together.square().sum(), three.first)[0]
        torch.testing.assert_close(gradient[1], torch.autograd.grad(alone.square().sum(), one.first)[0][0])


def test_the_gates_turn_hard_replicates_first(xor):
    steps = [xor.soft_neurons_at(xor.KINDS[2], epoch / 300) for epoch in range(300)]
    assert (steps[0], steps[-1]) == (2, 0)
    assert steps == sorted(steps, reverse=True)
    assert {xor.soft_neurons_at(xor.KINDS[3], epoch / 300) for epoch in range(300)} == {0}


def test_a_short_run_prints_and_draws(xor, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "xor.png"
    xor.main(["--epochs", "3", "--seeds", "2", "--out", str(picture)])
    printed = capsys.readouterr().out.splitlines()
    assert [line[:36].strip() for line in printed[:4]] == [kind.name for kind in xor.KINDS]
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert sorted(tmp_path.iterdir()) == [picture]


def test_a_fifth_of_the_run_solves_one_seed(xor):
    # 60 of 300 epochs; a network without gate sharing stays below 5/6
    (accuracy,) = xor.accuracies(xor.train(xor.KINDS[2], [2], 60))
    assert accuracy > 0.9


def test_training_repeats(xor):
    first, second = (xor.train(xor.KINDS[2], [0, 1], 3) for _ in range(2))
    for ours, again in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(ours, again)


@pytest.mark.slow
def test_only_the_gelu_phase_finds_it(xor):
    relu, snl, shared, without = (xor.accuracies(xor.train(kind, range(xor.SEEDS), xor.EPOCHS)) for kind in xor.KINDS)
    assert sum(accuracy > 0.96 for accuracy in shared) >= 4
    assert not any(accuracy > 0.96 for accuracy in without)  # the same line: solved or not
    # a strip along the diagonal is right on 5/6 of the square at most, a half plane across it on 2/3
    assert max(snl) < 5 / 6 + 0.01
    assert max(relu) < 2 / 3 + 0.01
