"""Two-party results against exact bounds, counters against formulas: one pair of processes runs every case."""

import importlib.util
from dataclasses import replace
from typing import Any

import pytest
import torch
from secure_cases import UNIT, bounds, cases

from deepshare.secure.baseline import costs
from deepshare.secure.baseline.jobs import Job
from deepshare.secure.baseline.launcher import run_jobs
from deepshare.secure.fixed_point import decode, encode
from deepshare.secure.lower import lower

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("crypten") is None, reason="needs CrypTen (deepshare doctor says how to install it)"
)
CASES = cases()
WEIGHTS = ("public", "secret")
MASKS = ("mask", "checkered_mask", "channel_mask", "zeroing_mask", "no_mask")
BATCH = 2


def jobs() -> dict[tuple[str, str], Job]:
    """Every case with public and with secret weights; what has no weights runs alike with both, so once."""
    made = {}
    for name, case in CASES.items():
        program, tensors = lower(case.model, tuple(case.images.shape[1:]))
        for weights in WEIGHTS if program.params else WEIGHTS[:1]:
            made[name, weights] = Job(program, tensors, encode(case.images), weights, min(BATCH, len(case.images)))
    return made


JOBS = jobs()
KEYS = list(JOBS)
Outcome = tuple[Job, dict[str, Any], dict[str, Any]]  # server's result, client's result


@pytest.fixture(scope="module")
def outcomes() -> dict[tuple[str, str], Outcome]:
    server, client = run_jobs(list(JOBS.values()))
    return {key: (job, server[i], client[i]) for i, (key, job) in enumerate(JOBS.items())}


@pytest.mark.parametrize(("name", "weights"), KEYS)
def test_result_lies_within_what_truncation_allows(outcomes, name, weights):
    job, _, client = outcomes[name, weights]
    check_result(job, client)


def check_result(job: Job, client: dict[str, Any]) -> None:
    allowed = bounds(job.program, job.tensors, job.images)
    off = (client["logits"].double() - allowed.centre).abs()
    assert client["logits"].shape == (len(job.images), *job.program.steps[-1].shape)
    assert bool((off <= allowed.radius + 1e-3).all()), f"off by {float((off - allowed.radius).max())} units"


@pytest.mark.parametrize("name", ["relu", "gate", "leader", "odd_map", "follower", *MASKS, "layers"])
def test_bounds_are_tight_enough_to_mean_something(name):
    case = CASES[name]
    program, tensors = lower(case.model, tuple(case.images.shape[1:]))
    radius = bounds(program, tensors, encode(case.images)).radius
    assert float(radius.median()) <= 16  # units of 2^-16
    if name in ("relu", *MASKS):
        assert float(radius.max()) == 0


@pytest.mark.parametrize(
    ("name", "weights"), [key for key in KEYS if key[0] not in ("gate", "leader", "shared_resnet")]
)
def test_result_equals_the_float_model(outcomes, name, weights):
    """Not where a prototype may be near 0: it flips under rounding and takes its replicates along."""
    case, client = CASES[name], outcomes[name, weights][2]
    plain = case.model(case.images).double()
    tolerance = 64 * UNIT if name == "resnet" else 16 * UNIT
    torch.testing.assert_close(decode(client["logits"]), plain, atol=tolerance, rtol=2 * UNIT)


def test_relu_at_the_edges_is_exact(outcomes):
    job, _, client = outcomes["relu", "public"]
    assert torch.equal(client["logits"], job.images.clamp(min=0))


@pytest.mark.parametrize("weights", WEIGHTS)
def test_gate_is_one_at_zero_and_minus_zero(outcomes, weights):
    """Read off the replicates, where x = 1: alpha + beta where the prototype, once rounded, is >= 0, else beta."""
    act, client = CASES["gate"].model[0], outcomes["gate", weights][2]
    gate = torch.tensor([1, 1, 1, 0, 1, 1, 1, 0, 1, 0, 1, 0]).reshape(3, 4)  # in the order of EDGES; -2^-18 rounds to 0
    expected = act.alpha[2:].reshape(2, 1, 1) * gate + act.beta[2:].reshape(2, 1, 1)
    torch.testing.assert_close(decode(client["logits"])[0, 2:], expected.double(), atol=2 * UNIT, rtol=0)


@pytest.mark.parametrize(("name", "weights"), KEYS)
def test_counters_equal_the_formulas(outcomes, name, weights):
    job, server, client = outcomes[name, weights]
    predicted = costs.predict(job.program, job.batch, secret=weights == "secret")
    assert server["spent"] == [(cost.rounds, cost.comm_bytes) for cost in predicted]
    assert client["spent"] == server["spent"]


@pytest.mark.parametrize(
    ("name", "weights", "step", "rounds", "counted"),
    [  # numbers of elements by hand: 48 = 4 * 3 * 4 an image; a batch of 2 but for relu (1 image)
        ("relu", "public", -2, 9, 464 * 48),
        ("checkered_mask", "public", -2, 9, 464 * 48),
        ("leader", "public", -2, 9, 2 * (16 * 96 + 216 * 48)),
        ("leader", "secret", -2, 10, 2 * (24 * 96 + 216 * 48 + 8 * 4)),
        ("follower", "public", -2, 1, 2 * 16 * 96),
        ("follower", "secret", -2, 2, 2 * (24 * 96 + 8 * 4)),
        ("channel_mask", "public", -2, 9, 464 * 48),
        ("zeroing_mask", "public", -2, 9, 464 * 48),
        ("no_mask", "public", -2, 0, 0),
        ("layers", "public", -2, 0, 0),
        ("layers", "secret", -2, 1, 2 * 8 * (2 * 16 + 16 * 5)),
        ("layers", "secret", -1, 1, 8 * 2 * 5),
    ],
)
def test_counters_by_hand(outcomes, name, weights, step, rounds, counted):
    assert outcomes[name, weights][1]["spent"][step] == (rounds, counted)


def test_a_mask_costs_what_it_keeps_however_ragged(outcomes):
    """One gathered comparison a site: 24 elements of a chequerboard cost what 24 in two whole channels do."""
    spent = {name: outcomes[name, "public"][1]["spent"] for name in ("checkered_mask", "channel_mask", "mask")}
    assert spent["checkered_mask"] == spent["channel_mask"]
    assert {name: cost[-2][0] for name, cost in spent.items()} == dict.fromkeys(spent, 9)


@pytest.mark.slow
def test_a_third_process_deals_to_every_case():
    """TTP: the online part is TFP's; each word the dealer sends is counted, at the server alone."""
    twice = JOBS["relu", "public"]
    twice = replace(twice, images=twice.images.repeat(2, 1, 1, 1), batch=2)
    server, client = run_jobs([*JOBS.values(), twice], provider="TTP")
    for (_, weights), job, at_server, at_client in zip(KEYS, JOBS.values(), server, client, strict=False):
        check_result(job, at_client)
        predicted = costs.predict(job.program, job.batch, secret=weights == "secret")
        assert at_server["spent"] == at_client["spent"] == [(cost.rounds, cost.comm_bytes) for cost in predicted]
        assert at_server["dealt"][0] == costs.dealt(job.program, job.batch, secret=weights == "secret")
        assert sum(at_client["dealt"]) == 0
    once = KEYS.index(("relu", "public"))
    per_element = [(result[-1]["undealt"] - result[once]["undealt"]) / 48 for result in (server, client)]
    relu_product, logits = 32, 8  # sent and received; of the product's correction, 8 more at the server
    assert per_element == [544 + relu_product + 8 + logits, 432 + relu_product + logits]


def test_client_is_never_given_secret_weights(outcomes):
    for (name, weights), (job, server, client) in outcomes.items():
        known = sorted(job.tensors) if weights == "public" else []
        assert client["received"] == [*known, "images"], name
        assert server["received"] == sorted(job.tensors)
        assert server["logits"] is None


def test_times_are_measured_for_every_batch(outcomes):
    job, server, client = outcomes["leader", "public"]
    assert client["sizes"] == [2, 1]
    assert len(client["online"]) == len(server["dealing"]) == 2
    assert min(client["online"]) > 0
    assert job.batch == 2
