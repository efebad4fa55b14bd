"""The raw ops: schemas, fakes, implementations, and the choice among these. The contract: docs/design.md, section 3."""

import importlib.util
import os
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from deepshare.kernels import native, reference, ring_reference
from deepshare.kernels.packing import packed_shape

_GATES = "Tensor? residual, Tensor? source, Tensor? gates, Tensor pi"
_SCHEMAS = {
    "shared_relu": f"(Tensor x, {_GATES}, Tensor alpha, Tensor beta, Tensor? soft_channels, Tensor? gamma) -> Tensor",
    "shared_relu_emit": (
        "(Tensor x, Tensor? residual, Tensor pi, Tensor alpha, Tensor beta, int prototypes) -> (Tensor y, Tensor gates)"
    ),
    "shared_relu_backward": (
        f"(Tensor grad, Tensor x, {_GATES}, Tensor members, Tensor offsets, Tensor alpha, Tensor beta, "
        "Tensor? soft_channels, Tensor? gamma) -> (Tensor dx, Tensor dsource, Tensor dalpha, Tensor dbeta)"
    ),
    "masked_relu": "(Tensor x, Tensor mask) -> Tensor",
    "masked_relu_backward": "(Tensor grad, Tensor x, Tensor mask) -> (Tensor dx, Tensor dmask)",
    "shared_relu_share": (
        "(Tensor opened, Tensor gates, Tensor pi, Tensor alpha, Tensor beta, Tensor flip, Tensor? scale, "
        "Tensor offset, Tensor toggle, int shift, int party) -> Tensor"
    ),
    "ring_conv2d": (
        "(Tensor x, Tensor weight, Tensor? packed, Tensor? pairs, int stride_h, int stride_w, "
        "int padding_h, int padding_w, int dilation_h, int dilation_w, int groups) -> Tensor"
    ),
}
_WITHOUT_TRITON = {"ring_conv2d"}


def _like_first(first, *rest):  # type: ignore[no-untyped-def]
    return torch.empty_like(first)


def _fake_emit(x, residual, pi, alpha, beta, prototypes):  # type: ignore[no-untyped-def]
    y = torch.empty_like(x)
    return y, x.new_empty(packed_shape(y, prototypes), dtype=torch.uint8)


def _fake_backward(grad, x, residual, source, gates, pi, members, offsets, alpha, beta, soft_channels, gamma):  # type: ignore[no-untyped-def]
    no_source_gradient = source is None or soft_channels is None
    dsource = x.new_empty(0) if no_source_gradient else torch.empty_like(source)
    return torch.empty_like(x), dsource, torch.empty_like(alpha), torch.empty_like(beta)


def _fake_masked_backward(grad, x, mask):  # type: ignore[no-untyped-def]
    return torch.empty_like(x), torch.empty_like(mask)


def _fake_ring_conv2d(  # type: ignore[no-untyped-def]
    x, weight, packed, pairs, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w, groups
):
    height = (x.shape[2] + 2 * padding_h - dilation_h * (weight.shape[2] - 1) - 1) // stride_h + 1
    width = (x.shape[3] + 2 * padding_w - dilation_w * (weight.shape[3] - 1) - 1) // stride_w + 1
    return x.new_empty(x.shape[0], weight.shape[0], height, width)


_FAKES: dict[str, Callable[..., Any]] = {
    "shared_relu": _like_first,
    "shared_relu_emit": _fake_emit,
    "shared_relu_backward": _fake_backward,
    "masked_relu": _like_first,
    "masked_relu_backward": _fake_masked_backward,
    "shared_relu_share": _like_first,
    "ring_conv2d": _fake_ring_conv2d,
}
# CPU tensors only, no fakes: nothing traces them. Their other form is numpy (deepshare/secure).
_GATE_SCHEMAS = {
    "dcf_evaluate": "(Tensor keys, Tensor roots, Tensor points, Tensor public_key, int party, int bits) -> Tensor",
    "dcf_generate": "(Tensor alphas, Tensor roots0, Tensor roots1, Tensor public_key, int bits) -> Tensor",
    "carry_leaves": "(Tensor words, Tensor opened) -> (Tensor generate, Tensor propagate)",
}
_TRITON_DEVICES = ("cuda", "cpu") if os.environ.get("TRITON_INTERPRET") == "1" else ("cuda",)


def _triton(name: str) -> Callable[..., Any]:
    """The Triton implementation. Imported at its first call: importing Triton costs more than the rest of deepshare."""

    def run(*arguments: Any) -> Any:
        from deepshare.kernels import triton_ops

        return getattr(triton_ops, name)(*arguments)

    return run


for _name, _schema in _SCHEMAS.items():
    for _suffix in ("native", "triton"):
        torch.library.define(f"deepshare::{_name}_{_suffix}", _schema)
        torch.library.register_fake(f"deepshare::{_name}_{_suffix}", _FAKES[_name])
    if _name not in _WITHOUT_TRITON:
        torch.library.impl(f"deepshare::{_name}_triton", _TRITON_DEVICES, _triton(_name))
for _name, _schema in _GATE_SCHEMAS.items():
    torch.library.define(f"deepshare::{_name}_native", _schema)
native.load()  # gives the native ops their implementations, where the extension was built


def _implementations(suffix: str) -> dict[str, Callable[..., Any]]:
    return {name: getattr(torch.ops.deepshare, f"{name}_{suffix}").default for name in _SCHEMAS}


# backend -> raw op -> what runs it. `reference` is called directly, it needs no op.
IMPLEMENTATIONS: dict[str, dict[str, Callable[..., Any]]] = {
    "reference": {name: getattr(ring_reference if name.startswith("ring_") else reference, name) for name in _SCHEMAS},
    "cpu": _implementations("native"),
    "triton": _implementations("triton"),
    "cuda": _implementations("native"),
}
_DEVICES = {
    "reference": ("cpu", "cuda", "mps", "xpu", "meta"),
    "cpu": ("cpu",),
    "triton": _TRITON_DEVICES,
    "cuda": ("cuda",),
}


def _triton_missing() -> str | None:
    """Why the Triton kernels cannot run here, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if "cpu" not in _TRITON_DEVICES and not torch.cuda.is_available():
        return "no CUDA device, and TRITON_INTERPRET=1 was not set before deepshare was imported"
    return None


def _cuda_missing() -> str | None:
    """Why the CUDA C++ kernels cannot run here, or None."""
    module = native.load()
    if module is None:
        return native.why_not()
    built = [int(architecture.removeprefix("sm_")) for architecture in module.build_info()["cuda_architectures"]]
    if not built:
        return "deepshare._C was built without CUDA (no nvcc at build time)"
    if not torch.cuda.is_available():
        return "no CUDA device, or a torch without CUDA"
    major, minor = torch.cuda.get_device_capability()
    if 10 * major + minor < min(built):
        return f"deepshare._C has code for sm_{min(built)} and newer, the GPU is sm_{major}{minor}"
    return None


@cache
def backends() -> dict[str, str | None]:
    """Every backend with None where it can run, else the reason why it cannot."""
    cpu = None if native.load() is not None else native.why_not()
    return {"reference": None, "cpu": cpu, "triton": _triton_missing(), "cuda": _cuda_missing()}


@cache
def carry_missing() -> str | None:
    """Why the native ops of the carry tree cannot run here, or None."""
    module = native.load()
    if module is None:
        return native.why_not()
    if "aes_kernels" not in module.build_info():
        return "deepshare._C was built from older sources, which had no gate ops (docs/build.md)"
    return None


@cache
def dcf_missing() -> str | None:
    """Why the native ops of the DCF gate cannot run here, or None."""
    module = native.load()
    if module is None or carry_missing() is not None:
        return carry_missing()
    return None if module.build_info()["aes_kernels"] else "this processor has no AES instructions (AES-NI)"


@cache
def default_backend(device_type: str) -> str:
    """The backend used for tensors on `device_type` ("cpu", "cuda", ...) when none is forced."""
    order = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}.get(device_type, ())
    return next((name for name in order if backends()[name] is None), "reference")


def _checked_backend(op: str, name: str, device_type: str) -> str:
    if name not in backends():
        raise ValueError(f"{op}: backend must be one of {', '.join(backends())} (got {name!r})")
    if backends()[name] is not None:
        raise RuntimeError(f"{op}: backend {name!r} is not available: {backends()[name]}")
    if device_type not in _DEVICES[name]:
        raise ValueError(f"{op}: backend {name!r} takes tensors on {' or '.join(_DEVICES[name])} (got {device_type})")
    return name


@cache
def _lacks(op: str, name: str, device_type: str) -> bool:
    """Whether a backend has no such op: Triton has not all of them, a library of an older build not the newest."""
    if name == "reference" or op not in _SCHEMAS:
        return False
    suffix = "triton" if name == "triton" else "native"
    return not torch._C._dispatch_has_kernel_for_dispatch_key(f"deepshare::{op}_{suffix}", device_type.upper())


def choose_backend(op: str, backend: str | None, device_type: str, *, caller: str | None = None) -> str:
    """The backend asked for, or the default one; the reference where the default one has no such op.

    Args:
        op: the raw op, and the name in messages where there is no `caller`.
        backend: what was asked for.
        device_type: of the tensors.
        caller: the public function, where its name is not the op's.

    Raises:
        ValueError: no backend of that name, or it does not take tensors on that device.
        RuntimeError: it is not available, or has no such op; the message says why.
    """
    if backend is None:
        name = default_backend(device_type)
        return "reference" if _lacks(op, name, device_type) else name
    name = _checked_backend(caller or op, backend, device_type)
    if _lacks(op, name, device_type):
        raise RuntimeError(f"{caller or op}: backend {name!r} has no {op} here (built before there was one, or never)")
    return name


# torch.compiler.assume_constant_result, whose import of torch._dynamo takes about as long as `import torch`: Dynamo
# must not trace into the search for a backend, its answer is a constant of the process.
choose_backend._dynamo_marked_constant = True  # type: ignore[attr-defined]
