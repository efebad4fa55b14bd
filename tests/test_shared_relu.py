"""Every compiled backend of shared_relu against the reference: random cases, y and every gradient."""

import os
import platform
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from operator_cases import (
    Case,
    assert_agrees,
    backend_parameters,
    device_of,
    inputs,
    random_case,
    run,
    truncates,
)

from deepshare import ChannelMap, shared_relu
from deepshare.kernels import native

BACKENDS = backend_parameters()
BLOCKS, CASES_PER_BLOCK = 20, 50  # 1,000 cases; blocks keep a failure's distance short
INTERPRETED_CASES, INTERPRETED_ELEMENTS = 10, 400  # a launch in Triton's interpreter takes milliseconds a program


def check(case: Case, backend: str) -> None:
    given = inputs(case, device_of(backend))
    ours, expected = run(case, given, backend), run(case, given, "reference")
    assert_agrees(case, given, ours, expected, truncates(backend, case.dtype))


@pytest.mark.parametrize("block", range(BLOCKS))
@pytest.mark.parametrize("backend", BACKENDS)
def test_random_cases(backend: str, block: int):
    interpreted = backend == "triton" and device_of(backend) == "cpu"
    count = INTERPRETED_CASES if interpreted else CASES_PER_BLOCK
    for number in range(block * CASES_PER_BLOCK, block * CASES_PER_BLOCK + count):
        check(random_case(number, INTERPRETED_ELEMENTS if interpreted else 6000), backend)


@pytest.mark.slow
@pytest.mark.parametrize("block", range(BLOCKS))
@pytest.mark.parametrize("backend", [p for p in BACKENDS if p.values[0] == "triton"])
def test_random_cases_the_interpreter_is_slow_for(backend: str, block: int):
    if device_of(backend) != "cpu":
        pytest.skip("on a GPU test_random_cases runs them all")
    for number in range(block * CASES_PER_BLOCK + INTERPRETED_CASES, (block + 1) * CASES_PER_BLOCK):
        check(random_case(number, INTERPRETED_ELEMENTS), backend)


def test_the_code_of_the_documentation():
    text = (Path(__file__).resolve().parents[1] / "docs" / "shared_relu.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict = {}
    for block in blocks:
        exec(block, names)
    assert len(blocks) == 3
    assert names["z"].shape == names["before"].shape


def test_the_cases_cover_what_they_promise():
    cases = [random_case(number) for number in range(BLOCKS * CASES_PER_BLOCK)]
    assert {len(case.shape) for case in cases} == {2, 3, 4, 5}
    assert any(case.shape == (1, 1, 1, 1) for case in cases)
    assert sum(case.shape[1] % case.prototypes != 0 for case in cases) > 100
    assert sum(case.is_hard for case in cases) > 100
    assert sum(0 < case.soft < case.shape[1] for case in cases) > 100
    assert sum(case.soft == case.shape[1] for case in cases) > 100
    own, leaders = (sum((case.source_channels is None) is own for case in cases) for own in (True, False))
    assert min(own, leaders) > 300
    assert sum(case.soft == 0 and case.soft_as_tensor for case in cases) > 50
    for dtype in {case.dtype for case in cases}:
        assert len({(case.x_layout, case.grad_layout) for case in cases if case.dtype == dtype}) == 25


@pytest.mark.parametrize("name", ["y", "dx", "dsource", "dalpha", "dbeta"])
def test_the_bounds_catch_one_wrong_gate_and_one_lost_term(name: str):
    case = Case(seed=3, shape=(4, 6, 250), prototypes=2, soft=3, source_channels=2)
    given = inputs(case)
    expected, wrong = run(case, given, "reference"), run(case, given, "reference")
    term = (given.x * given.grad).abs().median()
    if name == "y":  # the gate of one replicate turned over
        wrong.y[2, 4, 7] += given.x[2, 4, 7] * given.alpha[4]
    elif name == "dx":
        wrong.dx[2, 4, 7] += given.grad[2, 4, 7] * given.alpha[4]
    elif name == "dsource":  # a factor gamma or the density of another prototype: a change in the fourth digit
        wrong.dsource[:, 1] *= 1.0002
    else:  # one of 1,000 terms left out
        getattr(wrong, name)[1] -= term
    with pytest.raises(AssertionError, match=f"{name} is"):
        assert_agrees(case, given, wrong, expected, truncating=False)


LARGE = [
    Case(seed=1, shape=(2, 24, 61, 67), prototypes=5, map_kind="random"),
    Case(seed=2, shape=(2, 24, 61, 67), prototypes=5, map_kind="random", x_layout="channels_last"),
    Case(seed=3, shape=(2, 24, 61, 67), prototypes=5, soft=10, soft_as_tensor=True, source_channels=7),
    Case(seed=4, shape=(3, 130, 29, 31), prototypes=64, soft=130, x_layout="channels_last", grad_layout="contiguous"),
    Case(seed=5, shape=(2, 24, 61, 67), prototypes=24, dtype=torch.bfloat16, soft=7),
    Case(seed=6, shape=(70000, 3), prototypes=2, dtype=torch.float16, soft=2),
    Case(seed=7, shape=(1, 2, 70001), prototypes=1, dtype=torch.float64),
]


TOO_LARGE = "too many programs for Triton's interpreter; the same kernels run these on a GPU"


@pytest.mark.parametrize("case", LARGE, ids=lambda case: f"{case.seed}")
@pytest.mark.parametrize("backend", BACKENDS)
def test_sizes_of_many_blocks(backend: str, case: Case):
    if backend == "triton" and device_of(backend) == "cpu":
        pytest.skip(TOO_LARGE)
    check(case, backend)


@pytest.mark.parametrize("case", LARGE, ids=lambda case: f"{case.seed}")
@pytest.mark.parametrize("backend", BACKENDS)
def test_sums_of_integers_are_exact(backend: str, case: Case):
    # |g x| <= 16 and at most 70,001 terms stay below 2^24: a single lost or doubled term shows
    if backend == "triton" and device_of(backend) == "cpu":
        case = replace(
            case, shape=(2, 9, 7, 5) if len(case.shape) == 4 else (37, 9), prototypes=min(case.prototypes, 9)
        )
    case = replace(case, integers=True, soft=0, soft_as_tensor=False)
    given = inputs(case, device_of(backend))
    ours, expected = run(case, given, backend), run(case, given, "reference")
    for name in ("dalpha", "dbeta"):
        assert torch.equal(getattr(ours, name), getattr(expected, name)), name


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["first", "last"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_beyond_the_caches(backend: str, memory_format: torch.memory_format):
    # 32 MiB of small integers: every product and sum is exact, so all outputs must be equal
    if backend == "triton" and device_of(backend) == "cpu":
        pytest.skip(TOO_LARGE)
    generator = torch.Generator().manual_seed(8)
    shape = (2, 64, 255, 257)
    x, grad = (torch.randint(-2, 3, shape, generator=generator).float() for _ in range(2))
    x, grad = (t.to(device_of(backend)).contiguous(memory_format=memory_format) for t in (x, grad))
    fewer = ChannelMap.balanced(64, 6).to(x.device)
    alpha, beta = (torch.randint(-3, 4, (64,), generator=generator).float().to(x.device) for _ in range(2))
    leaves = [t.requires_grad_() for t in (x, alpha, beta)]
    results = []
    for name in (backend, "reference"):
        y = shared_relu(x, fewer, alpha, beta, backend=name)
        results.append((y.detach(), *torch.autograd.grad(y, leaves, grad)))
    for ours, expected in zip(*results, strict=True):
        assert torch.equal(ours, expected)


EVERY_FOURTH = """
import os, sys
sys.path[:0] = sys.argv[1:3]
import torch
torch.use_deterministic_algorithms(True)
torch.set_num_threads(1)
from deepshare.kernels import native
from test_shared_relu import BLOCKS, CASES_PER_BLOCK, LARGE, check
from operator_cases import random_case
assert native.load() is not None, native.why_not()
assert native.load().build_info()["cpu_kernels"] == os.environ["DEEPSHARE_CPU_ISA"]
for case in [*map(random_case, range(0, BLOCKS * CASES_PER_BLOCK, 4)), *LARGE]:
    check(case, "cpu")
"""


@pytest.mark.parametrize("instruction_set", ["baseline", "x86_64_v3", "x86_64_v4"])
@pytest.mark.parametrize("backend", [p for p in BACKENDS if p.values[0] == "cpu"])
def test_every_instruction_set(backend: str, instruction_set: str):
    # one process runs the build that suits its processor; the others are forced, each in a process of its own
    info = native.load().build_info()
    if info["cpu_kernels"] == instruction_set:
        pytest.skip("the cases above ran it")
    needs = {"baseline": set(), "x86_64_v3": {"avx2", "fma", "bmi2"}, "x86_64_v4": {"avx512f", "avx512bw", "avx512vl"}}
    if platform.machine() != "x86_64" or not needs[instruction_set] <= set(info["cpu_instruction_sets"]):
        pytest.skip(f"this processor has no {instruction_set} build or cannot run it")
    here = Path(__file__).resolve().parent
    command = [sys.executable, "-c", EVERY_FOURTH, str(here.parent), str(here)]
    environment = {**os.environ, "DEEPSHARE_CPU_ISA": instruction_set}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
