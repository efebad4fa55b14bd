"""The CPU kernels' own Phi and phi (csrc/cpu/math.h), reached through the public op, against float64."""

import hashlib
import math
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from deepshare import ChannelMap, shared_relu
from deepshare.kernels import native

pytestmark = pytest.mark.skipif(
    native.load() is None and os.environ.get("DEEPSHARE_BUILD") != "require", reason=native.why_not() or "loaded"
)
EPS = torch.finfo(torch.float32).eps


def gate_and_slope(values: Tensor, gamma: float = 1.0, pixels: bool = False) -> tuple[Tensor, Tensor]:
    """Phi(gamma * values) and gamma * phi(gamma * values): y and dsource where x, alpha and the gradient are 1."""
    shape = (-1, 1) if pixels else (1, 1, -1)
    source = values.reshape(shape).detach().requires_grad_()
    ones, one_map = torch.ones_like(source).detach(), ChannelMap.balanced(1, 1)
    alpha, beta = torch.ones(1, dtype=values.dtype), torch.zeros(1, dtype=values.dtype)
    y = shared_relu(ones, one_map, alpha, beta, source=source, soft_channels=1, gamma=gamma, backend="cpu")
    (slope,) = torch.autograd.grad(y.sum(), source)
    return y.detach().flatten(), slope.flatten()


def every_so_many_floats(step: int) -> Tensor:
    """Every `step`th of all float32 bit patterns that are numbers: both signs, subnormals to infinity."""
    patterns = torch.arange(-(2**31), 2**31, step, dtype=torch.int64).to(torch.int32)
    values = patterns.view(torch.float32)
    return values[~values.isnan()]


def dense_values() -> Tensor:
    return torch.linspace(-15, 15, 2_000_001, dtype=torch.float64).float()


@pytest.mark.parametrize("values", [every_so_many_floats(1499), dense_values()], ids=["all", "dense"])
def test_gate_and_slope_are_within_their_bounds(values: Tensor):
    gate, slope = gate_and_slope(values)
    wide = values.double()
    density = torch.exp(-0.5 * wide.square()) / math.sqrt(2 * math.pi)
    assert (gate.double() - torch.special.ndtr(wide)).abs().max() <= 2 * EPS
    assert (slope.double() - density).abs().max() <= 0.5 * EPS
    normal = wide.abs() < 13  # beyond, phi is subnormal
    relative = (slope.double() / density - 1).abs()[normal] / EPS
    assert (relative - wide[normal].square() / 4).max() <= 1.2
    assert ((gate >= 0) & (gate <= 1)).all()
    assert len(values) > 2_000_000


@pytest.mark.parametrize("pixels", [False, True])
def test_special_values(pixels: bool):
    inf, nan = math.inf, math.nan
    values = torch.tensor([0.0, -0.0, 1e-45, 5.5, -5.5, 1e19, -1e19, 3e38, -3e38, inf, -inf, nan])
    gate, slope = gate_and_slope(values, pixels=pixels)
    expected = torch.tensor([0.5, 0.5, 0.5, 1, 0, 1, 0, 1, 0, 1, 0, nan])
    assert torch.equal(gate[:-1], expected[:-1])
    assert gate[-1].isnan()
    top = 1 / math.sqrt(2 * math.pi)
    assert (slope[:3] - top).abs().max() <= EPS / 4
    assert slope[5:11].tolist() == [0.0] * 6
    assert slope[-1].isnan()


def test_subnormal_densities_are_kept():
    """phi falls below the smallest normal number at 13.16, to 0 at 14.4."""
    values = torch.linspace(13.2, 14.2, 1001)
    slope = gate_and_slope(values)[1].double()
    density = torch.exp(-0.5 * values.double().square()) / math.sqrt(2 * math.pi)
    assert (slope > 0).all()
    assert (slope - density).abs().max() <= (13.2**2 / 4 + 1.2) * EPS * density.max() + 2 * 2.0**-149


def test_gamma_scales_both():
    values = torch.linspace(-3, 3, 10_001)
    gate, slope = gate_and_slope(values, gamma=4.0)
    same_gate, same_slope = gate_and_slope(4 * values)
    assert torch.equal(gate, same_gate)
    assert torch.equal(slope, 4 * same_slope)


def test_float64_gates_are_within_some_units():
    values = torch.linspace(-9, 9, 100_001, dtype=torch.float64)
    gate, slope = gate_and_slope(values)
    eps = torch.finfo(torch.float64).eps
    assert (gate - torch.special.ndtr(values)).abs().max() <= 4 * eps
    assert (slope - torch.exp(-0.5 * values.square()) / math.sqrt(2 * math.pi)).abs().max() <= 2 * eps


def digest() -> str:
    """Of the bits of gate and slope, over rows and over single pixels."""
    results = [*gate_and_slope(every_so_many_floats(65_537)), *gate_and_slope(dense_values()[::1009], pixels=True)]
    return hashlib.sha256(b"".join(t.numpy().tobytes() for t in results)).hexdigest()


@pytest.mark.parametrize("instruction_set", ["baseline", "x86_64_v3", "x86_64_v4"])
def test_bits_do_not_depend_on_the_instruction_set(instruction_set: str):
    code = "import test_cpu_math as t; from deepshare.kernels import native;" \
           "print(native.load().build_info()['cpu_kernels'], t.digest())"  # fmt: skip
    environment = {**os.environ, "DEEPSHARE_CPU_ISA": instruction_set}
    environment["PYTHONPATH"] = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    if "DEEPSHARE_CPU_ISA must be one of" in done.stderr:
        pytest.skip(f"this processor or build has no {instruction_set}")
    assert done.stdout.split() == [instruction_set, digest()], done.stderr
