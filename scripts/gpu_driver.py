"""Runs the CUDA and Triton kernels on random cases, without checking values: what compute-sanitizer watches.

Inputs are made on the CPU and copied: uninitialised reads can only come from the kernels. The tests check values.
"""

import random
import sys
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from operator_cases import Case, Inputs, inputs, laid_out, random_case, run  # noqa: E402

from deepshare import masked_relu, pack_gates, ring_conv2d, shared_relu, shared_relu_share  # noqa: E402

CASES = 60


def exercise(case: Case, device: str, backend: str) -> None:
    """Every operator on the tensors of a case, forward and backward."""
    given = inputs(case, device)
    run(case, given, backend)
    residual(case, given, backend)
    if case.is_hard:
        leader_and_follower(given, backend)
    masked(given, backend)
    share(case, given, backend)
    if backend == "cuda":
        convolution(case.seed, device)


def residual(case: Case, given: Inputs, backend: str) -> None:
    """y = act(x + residual); the incoming gradient serves as the residual."""
    leaves = [t.detach().requires_grad_() for t in (given.x, given.grad, given.alpha, given.beta)]
    x, added, alpha, beta = leaves
    y = shared_relu(
        x, given.channel_map, alpha, beta, source=given.source, residual=added,
        soft_channels=case.soft, gamma=case.gamma, backend=backend,
    )  # fmt: skip
    torch.autograd.grad(y, leaves, given.grad)


def leader_and_follower(given: Inputs, backend: str) -> None:
    """A leader emits packed gates, with and without a residual; followers read them."""
    x, alpha, beta = (t.detach().requires_grad_() for t in (given.x, given.alpha, given.beta))
    for added in (None, given.grad):
        y, gates = shared_relu(x, given.channel_map, alpha, beta, residual=added, return_gates=True, backend=backend)
        z = shared_relu(y, given.channel_map, alpha, beta, source=gates, residual=added, backend=backend)
        torch.autograd.grad(z, [x, alpha, beta], given.grad)


def masked(given: Inputs, backend: str) -> None:
    """A mask per pixel and one per channel."""
    for shape in (given.x.shape[1:], given.x.shape[1:2]):
        x, mask = given.x.detach().requires_grad_(), torch.rand(shape).to(given.x.device).requires_grad_()
        torch.autograd.grad(masked_relu(x, mask, backend=backend), [x, mask], given.grad)


def share(case: Case, given: Inputs, backend: str) -> None:
    """Both parties' shares, with a flip of every channel and with one of the prototypes and a scale."""
    draw, device = random.Random(case.seed), given.x.device

    def integers(*shape: int, layout: str = "contiguous") -> Tensor:
        values = torch.randint(-(2**62), 2**62, shape).to(device)
        return laid_out(values, layout, draw) if layout != "sliced" else values  # its gaps are NaN, of which none here

    batch, channels, *rest = case.shape
    opened, flip, offset, toggle = (integers(*case.shape, layout=case.x_layout) for _ in range(4))
    alpha, beta, scale = (integers(channels) for _ in range(3))
    gates = pack_gates(integers(batch, case.prototypes, *rest) >= 0)
    shared = {"offset": offset, "toggle": toggle, "shift": 16, "backend": backend}
    for party in (0, 1):
        shared_relu_share(opened, gates, given.channel_map, alpha, beta, flip, party=party, **shared)
        few = flip[:, : case.prototypes]
        shared_relu_share(opened, gates, given.channel_map, alpha, beta, few, party=party, scale=scale, **shared)


def convolution(seed: int, device: str) -> None:
    """In Z_2^64: dense, in groups and depthwise, with whole tiles and without, sums cut among blocks."""
    draw = random.Random(seed)
    groups, deep, out = draw.choice([(1, 3, 64), (1, 70, 9), (1, 64, 130), (4, 20, 12), (9, 1, 1)])
    size, kernel = draw.choice([4, 9, 17]), draw.choice([1, 3])
    x = torch.randint(-(2**62), 2**62, (draw.choice([1, 3]), groups * deep, size, size + 1)).to(device)
    x = x.contiguous(memory_format=draw.choice([torch.contiguous_format, torch.channels_last]))
    weight = torch.randint(-(2**62), 2**62, (groups * out, deep, kernel, kernel)).to(device)
    ring_conv2d(x, weight, stride=draw.choice([1, 2]), padding=kernel // 2, groups=groups, backend="cuda")


def main() -> None:
    from deepshare.raw_ops import backends

    for backend in ("cuda", "triton"):
        reason = backends()[backend]
        if reason is not None:
            print(f"{backend}: not run: {reason}")
            continue
        for number in range(CASES):
            exercise(random_case(number), "cuda", backend)
        torch.cuda.synchronize()
        print(f"{backend}: {CASES} cases run")


if __name__ == "__main__":
    main()
