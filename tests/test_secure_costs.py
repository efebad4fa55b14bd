"""The cost formulas against published and measured totals; test_secure_layers.py holds them against the counters."""

import pytest
import torch
from secure_cases import grouped
from torch import nn

from deepshare import models
from deepshare.nn import MaskedReLU2d, SharedReLU2d
from deepshare.plan import Plan, apply_plan
from deepshare.secure.baseline import costs
from deepshare.secure.baseline.costs import Cost
from deepshare.secure.lower import lower
from deepshare.secure.program import Program


def test_formulas_per_element():
    assert costs.drelu(1) == Cost(8, 216, 216)
    assert costs.relu(1) == Cost(9, 232, 232)
    assert costs.product(1, 1) == Cost(1, 16, 16)
    assert costs.relu(1).comm_bytes == 464
    assert costs.open_to_client(10) == Cost(1, 80, 0)
    assert costs.drelu(0) == costs.relu(0) == Cost()


@pytest.mark.parametrize(
    ("model", "secret", "sent"),
    [  # words for one image of 4 * 9 elements: a DReLU takes 13 + 1, a product 1 a result
        (nn.ReLU(), False, 15 * 36),
        (MaskedReLU2d(torch.tensor([True, False, False, False])), True, 15 * 9),
        (SharedReLU2d(4, 2), False, 14 * 18 + 36),
        (SharedReLU2d(4, 2), True, 14 * 18 + 36 + 36),
        (nn.Conv2d(4, 5, 2), False, 0),
        (nn.Conv2d(4, 5, 2), True, 5 * 4),
        (nn.MaxPool2d(3), False, 15 * 8 * 4),
    ],
)
def test_words_the_dealer_sends(model, secret, sent):
    program, _ = lower(nn.Sequential(model), (4, 3, 3))
    assert costs.dealt(program, 1, secret=secret) == 8 * sent
    assert costs.dealt(program, 3, secret=secret) == 3 * 8 * sent


@pytest.mark.parametrize(
    ("secret", "gates", "expected"),
    [
        (False, 25, (9, 16 * 100 + 216 * 25)),
        (True, 25, (10, 24 * 100 + 216 * 25 + 8 * 4)),
        (False, 0, (1, 16 * 100)),
        (True, 0, (2, 24 * 100 + 8 * 4)),
    ],
)
def test_shared_site(secret, gates, expected):
    cost = costs.shared(100, 4, gates, secret=secret)
    assert (cost.rounds, cost.server_sends, cost.client_sends) == (expected[0], expected[1], expected[1])


@pytest.fixture(scope="module")
def resnet18() -> Program:
    return lower(models.create("resnet18", num_classes=100, stem_relu=True), (3, 32, 32))[0]


@pytest.mark.parametrize(("secret", "rounds", "megabytes"), [(False, 153, 129.2), (True, 174, 224.3)])
def test_all_relu_resnet18(resnet18, secret, rounds, megabytes):
    """CrypTen's all-ReLU ResNet18 at 32x32, measured: 153 / 174 rounds, 129 / 224 MB one way; opening is one more."""
    assert resnet18.total_drelus == 557_056
    cost = costs.total(costs.predict(resnet18, 1, secret=secret))
    assert cost.rounds == rounds + 1
    assert cost.client_sends / 1e6 == pytest.approx(megabytes, abs=0.05)
    assert cost.server_sends - cost.client_sends == 8 * 100


def test_costs_grow_with_the_batch_but_rounds_do_not(resnet18):
    one, three = (costs.total(costs.predict(resnet18, batch, secret=False)) for batch in (1, 3))
    assert (three.rounds, three.server_sends) == (one.rounds, 3 * one.server_sends)


def test_layer_sharing_resnet18():
    """One group per stage: four leaders of 9 (10) rounds, thirteen followers of 1 (2), 21 linear layers of 0 (1)."""
    model = models.create("resnet18", num_classes=100, stem_relu=True)
    plan = grouped(Plan.of(model, (3, 32, 32)), 4)
    program, _ = lower(apply_plan(model, plan), (3, 32, 32))
    public, secret, two = (
        costs.total(costs.predict(program, batch, secret=hidden))
        for batch, hidden in ((1, False), (1, True), (2, True))
    )
    assert (public.rounds, secret.rounds) == (49 + 1, 87 + 1)
    assert public.client_sends == 16 * 557_056 + 216 * plan.drelus
    fixed = 2 * secret.client_sends - two.client_sends  # what does not grow with the batch: openings of the parameters
    weights = sum(p.numel() for p in model.parameters() if p.dim() >= 2)
    alphas = sum(site.channels for site in plan.sites)
    assert fixed == 8 * (weights + alphas)
