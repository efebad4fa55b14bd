"""Every bad input of shared_relu: an error that names the op, the argument, what was wanted and what came."""

import re

import pytest
import torch

from deepshare import ChannelMap, shared_relu
from deepshare.raw_ops import backends

FEWER = ChannelMap.balanced(4, 2)
GOOD = {"x": torch.ones(2, 4, 3), "channel_map": FEWER, "alpha": torch.ones(4), "beta": torch.zeros(4)}

BAD = {
    "x no tensor": ({"x": [1.0]}, TypeError, "x must be a tensor (got list)"),
    "x integer": (
        {"x": torch.ones(2, 4, 3, dtype=torch.int32)},
        TypeError,
        "x must be float32, float16, bfloat16 or float64 (got torch.int32)",
    ),
    "x complex": ({"x": torch.ones(2, 4, dtype=torch.cfloat)}, TypeError, "(got torch.complex64)"),
    "x vector": ({"x": torch.ones(4)}, ValueError, "x must be [N, 4, *S] as channel_map says (got [4])"),
    "x channels": (
        {"x": torch.ones(2, 5, 3)},
        ValueError,
        "x must be [N, 4, *S] as channel_map says (got [2, 5, 3])",
    ),
    "map no map": ({"channel_map": FEWER.pi}, TypeError, "channel_map must be a ChannelMap (got Tensor)"),
    "map device": (
        {"channel_map": ChannelMap.balanced(4, 2).to("meta")},
        ValueError,
        "channel_map must be on x's device cpu (got meta)",
    ),
    "alpha no tensor": ({"alpha": 1.0}, TypeError, "alpha must be a tensor (got float)"),
    "alpha shape": (
        {"alpha": torch.ones(4, 1)},
        ValueError,
        "alpha must be floating point [4] (got torch.float32 [4, 1])",
    ),
    "beta dtype": (
        {"beta": torch.ones(4, dtype=torch.int64)},
        ValueError,
        "beta must be floating point [4] (got torch.int64 [4])",
    ),
    "beta length": ({"beta": torch.ones(3)}, ValueError, "beta must be floating point [4] (got torch.float32 [3])"),
    "alpha device": (
        {"alpha": torch.ones(4, device="meta")},
        ValueError,
        "alpha must be on x's device cpu (got meta)",
    ),
    "source no tensor": ({"source": 3}, TypeError, "source must be a tensor or PackedGates (got int)"),
    "source dtype": (
        {"source": torch.ones(2, 4, 3).half()},
        TypeError,
        "source must be torch.float32 on cpu like x (got torch.float16 on cpu)",
    ),
    "source device": (
        {"source": torch.ones(2, 4, 3, device="meta")},
        TypeError,
        "source must be torch.float32 on cpu like x (got torch.float32 on meta)",
    ),
    "source narrow": ({"source": torch.ones(2, 1, 3)}, ValueError, "source must be [2, '>=2', 3] (got [2, 1, 3])"),
    "source batch": ({"source": torch.ones(1, 4, 3)}, ValueError, "source must be [2, '>=2', 3] (got [1, 4, 3])"),
    "source space": ({"source": torch.ones(2, 4, 6)}, ValueError, "source must be [2, '>=2', 3] (got [2, 4, 6])"),
    "source rank": ({"source": torch.ones(2, 4)}, ValueError, "source must be [2, '>=2', 3] (got [2, 4])"),
    "soft negative": ({"soft_channels": -1}, ValueError, "soft_channels must be an int in 0..4 (got -1)"),
    "soft beyond C": ({"soft_channels": 5}, ValueError, "soft_channels must be an int in 0..4 (got 5)"),
    "soft bool": ({"soft_channels": True}, TypeError, "soft_channels must be an int or a tensor (got True)"),
    "soft float": ({"soft_channels": 1.5}, TypeError, "soft_channels must be an int or a tensor (got 1.5)"),
    "soft tensor dtype": (
        {"soft_channels": torch.tensor(2)},
        ValueError,
        "soft_channels must be an int or an int32 0-dim tensor on cpu (got torch.int64 [] on cpu)",
    ),
    "soft tensor shape": (
        {"soft_channels": torch.ones(1, dtype=torch.int32)},
        ValueError,
        "soft_channels must be an int or an int32 0-dim tensor on cpu (got torch.int32 [1] on cpu)",
    ),
    "gamma text": ({"gamma": "1"}, TypeError, "gamma must be a number or a tensor (got '1')"),
    "gamma tensor shape": (
        {"gamma": torch.ones(4)},
        ValueError,
        "gamma must be a number or a floating 0-dim tensor on cpu (got torch.float32 [4] on cpu)",
    ),
    "gamma tensor dtype": (
        {"gamma": torch.tensor(1)},
        ValueError,
        "gamma must be a number or a floating 0-dim tensor on cpu (got torch.int64 [] on cpu)",
    ),
    "backend unknown": (
        {"backend": "opencl"},
        ValueError,
        "backend must be one of reference, cpu, triton, cuda (got 'opencl')",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str):
    changes, kind, message = BAD[name]
    arguments = {"soft_channels": 2, **GOOD, **changes}
    with pytest.raises(kind, match=re.escape(message)) as caught:
        shared_relu(**arguments)
    assert str(caught.value).startswith("shared_relu: ")


def test_the_unchanged_arguments_are_good():
    assert shared_relu(**GOOD, soft_channels=2, source=torch.ones(2, 7, 3)).shape == (2, 4, 3)


@pytest.mark.parametrize("backend", ["cpu", "triton", "cuda"])
def test_a_missing_backend_says_why(backend: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(backends(), backend, "the moon is full")
    with pytest.raises(RuntimeError, match=f"shared_relu: backend '{backend}' is not available: the moon is full"):
        shared_relu(**GOOD, backend=backend)


def test_a_backend_for_another_device_says_which(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(backends(), "cuda", None)
    with pytest.raises(ValueError, match=r"shared_relu: backend 'cuda' takes tensors on cuda \(got cpu\)"):
        shared_relu(**GOOD, backend="cuda")
