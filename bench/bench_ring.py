"""Convolution in Z_2^64 beside torch's conv2d of int64: ResNet18's convolutions at 32x32, batch 1, and a few others.

    OMP_NUM_THREADS=1 python -m pytest bench/bench_ring.py --benchmark-only --benchmark-json=ring.json

`packed`: the weight was packed before, as the secure engine keeps it; `plain`: it is packed at every call. torch has no
such convolution on a GPU: there the baseline is the reference, by fp64 matrix products.
"""

from dataclasses import dataclass

import pytest
import torch
from interleave import DEVICE, Call, per_replayed_call, replay
from measure import Measure
from torch.nn import functional

from deepshare import pack_weight, ring_conv2d

pytestmark = pytest.mark.benchmark(timer=per_replayed_call)


@dataclass(frozen=True)
class Layer:
    """A convolution of images [1, channels, size, size]."""

    channels: int
    out: int
    size: int
    kernel: int = 3
    stride: int = 1
    groups: int = 1

    def __str__(self) -> str:
        groups = f" in {self.groups} groups" if self.groups > 1 else ""
        return f"{self.channels}-{self.out}{groups} {self.kernel}x{self.kernel}/{self.stride} on {self.size}"


# ResNet18: the number of layers of a kind; the sum over its 20 convolutions is of these times.
RESNET18 = {
    Layer(3, 64, 32): 1,
    Layer(64, 64, 32): 4,
    Layer(64, 128, 32, stride=2): 1,
    Layer(64, 128, 32, kernel=1, stride=2): 1,
    Layer(128, 128, 16): 3,
    Layer(128, 256, 16, stride=2): 1,
    Layer(128, 256, 16, kernel=1, stride=2): 1,
    Layer(256, 256, 8): 3,
    Layer(256, 512, 8, stride=2): 1,
    Layer(256, 512, 8, kernel=1, stride=2): 1,
    Layer(512, 512, 4): 3,
}
MOBILENET = (Layer(96, 96, 32, groups=96), Layer(960, 960, 4, groups=960), Layer(64, 384, 8, kernel=1))
QUICK = (Layer(64, 64, 32), Layer(512, 512, 4))
PROVIDERS = ("torch", "plain", "packed")
ROWS = [
    pytest.param(layer, provider, id=f"{layer} {provider}".replace(" ", "-"), marks=marks)
    for layer in (*RESNET18, *MOBILENET)
    for provider in PROVIDERS
    for marks in [[pytest.mark.quick] if layer in QUICK else []]
]


def call(provider: str, layer: Layer) -> Call:
    draw = torch.Generator().manual_seed(0)
    x = torch.randint(-(2**63), 2**63 - 1, (1, layer.channels, layer.size, layer.size), generator=draw).to(DEVICE)
    shape = (layer.out, layer.channels // layer.groups, layer.kernel, layer.kernel)
    weight = torch.randint(-(2**19), 2**19, shape, generator=draw).to(DEVICE)  # below 8 at 16 fractional bits
    settings = {"stride": layer.stride, "padding": layer.kernel // 2, "groups": layer.groups}
    if provider == "torch":
        if DEVICE == "cuda":
            return lambda: ring_conv2d(x, weight, **settings, backend="reference")
        return lambda: functional.conv2d(x, weight, **settings)
    kept = pack_weight(weight, layer.groups) if provider == "packed" else weight
    return lambda: ring_conv2d(x, kept, **settings)


@pytest.mark.parametrize(("layer", "provider"), ROWS)
def test_ring_conv2d(measure: Measure, layer: Layer, provider: str):
    with measure.stream():
        compared = ("torch",) if provider != "torch" else ()
        measure(
            replay(call(provider, layer)),
            {name: replay(call(name, layer)) for name in compared},
            kind="op",
            name="ring_conv2d",
            provider=provider,
            baseline="torch",
            ours=provider != "torch",
            case=str(layer),
        )
