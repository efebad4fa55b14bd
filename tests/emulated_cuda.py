"""The CUDA kernels of kernels/cuda run on the CPU: compiled with g++ against tests/cuda_emulation, called by ctypes.

Outputs and workspaces come filled with NaN bytes, between guards that no kernel may touch; inputs lie between NaN.
"""

import ctypes
import hashlib
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from deepshare.kernels.layout import geometry, in_order_of, memory_order
from deepshare.kernels.packing import packed_prototypes, packed_shape

ROOT = Path(__file__).resolve().parents[1]
KERNELS, EMULATION = ROOT / "kernels" / "cuda", ROOT / "tests" / "cuda_emulation"
# No contraction: nvcc contracts only where a test allows for it, and what must not be is spelled out in the kernels.
FLAGS = ("-std=c++17", "-O1", "-fPIC", "-ffp-contract=off", f"-I{EMULATION}", f"-I{KERNELS}")
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3}
GUARD = 64  # bytes


def missing() -> str | None:
    """Why the kernels cannot be emulated here, or None."""
    return None if shutil.which("g++") else "g++ is not on the PATH"


@cache
def library() -> ctypes.CDLL:
    """The emulated launchers, compiled once for these sources."""
    sources = [*sorted(KERNELS.iterdir()), *sorted(EMULATION.iterdir())]
    key = hashlib.sha256("\0".join([*FLAGS, *(path.read_text() for path in sources)]).encode()).hexdigest()[:16]
    folder = ROOT / "build" / "cuda-emulation"
    target = folder / f"{key}.so"
    if not target.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            _compile([path for path in sources if path.suffix in (".cu", ".cpp")], Path(scratch), target)
    emulated = ctypes.CDLL(str(target))
    for name in ("forward", "backward", "masked_forward", "masked_backward", "share", "ring_conv2d"):
        getattr(emulated, name).restype = ctypes.c_char_p
    emulated.backward_bytes.restype = emulated.masked_bytes.restype = ctypes.c_size_t
    emulated.masked_bytes.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    emulated.fast_quotient.argtypes, emulated.fast_quotient.restype = [ctypes.c_int64] * 2, ctypes.c_int64
    return emulated


def _compile(sources: list[Path], scratch: Path, target: Path) -> None:
    def one(source: Path) -> str:
        out = scratch / f"{source.stem}.o"
        subprocess.run(["g++", *FLAGS, "-x", "c++", "-c", str(source), "-o", str(out)], check=True)
        return str(out)

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(one, sources))
    linked = scratch / target.name
    subprocess.run(["g++", "-shared", "-o", str(linked), *objects], check=True)
    linked.replace(target)


def _structure(name: str, fields: str) -> type[ctypes.Structure]:
    """A C struct of `type name` pairs: D dtype, G geometry, I int64, P pointer."""
    types = {"D": ctypes.c_int, "G": GeometryArgs, "I": ctypes.c_int64, "P": ctypes.c_void_p}
    pairs = [field.split(":") for field in fields.split()]
    return type(name, (ctypes.Structure,), {"_fields_": [(field, types[kind]) for kind, field in pairs]})


class GeometryArgs(ctypes.Structure):
    """struct Geometry of shared_relu.h."""

    _fields_ = [(name, ctypes.c_int64) for name in ("outer", "channels", "inner", "source_channels", "prototypes")]


ForwardArgs = _structure(
    "ForwardArgs",
    "D:dtype G:geometry P:x P:residual P:source P:gates P:pi P:alpha P:beta P:soft_channels P:gamma P:y P:emitted",
)
BackwardArgs = _structure(
    "BackwardArgs",
    "D:dtype G:geometry P:grad P:x P:residual P:source P:gates P:pi P:members P:offsets P:alpha P:beta P:soft_channels "
    "P:gamma P:dx P:dsource P:dalpha P:dbeta P:workspace",
)
MaskedForwardArgs = _structure("MaskedForwardArgs", "D:dtype I:batch I:elements P:x P:mask P:y")
MaskedBackwardArgs = _structure(
    "MaskedBackwardArgs", "D:dtype I:batch I:elements P:grad P:x P:mask P:dx P:dmask P:workspace"
)
ShareArgs = _structure(
    "ShareArgs",
    "G:geometry P:opened P:gates P:pi P:alpha P:beta P:flip P:scale P:offset P:toggle I:shift I:party P:y",
)


class RingAxis(ctypes.Structure):
    """struct RingAxis of ring_conv.h."""

    _fields_ = [(name, ctypes.c_int64) for name in ("size", "kernel", "stride", "padding", "dilation", "outputs")]


class RingConvArgs(ctypes.Structure):
    """struct RingConvArgs of ring_conv.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "channels", "out_channels", "groups")),
        *((name, RingAxis) for name in ("height", "width")),
        ("x", ctypes.c_void_p),
        ("x_strides", ctypes.c_int64 * 4),
        *((name, ctypes.c_void_p) for name in ("weight", "packed", "pairs")),
        ("narrow", ctypes.c_bool),
        ("y", ctypes.c_void_p),
    ]


class Memory:
    """The device memory of one call: copies of its inputs, its outputs, and what lies around them.

    `offset` bytes move every data tensor off its 16-byte alignment.
    """

    def __init__(self, offset: int = 0):
        self.offset = offset
        self.buffers: list[tuple[Tensor, int, int]] = []  # (bytes, begin, end)

    def _place(self, size: int) -> Tensor:
        buffer = torch.full((size + 2 * GUARD + 16 + self.offset,), 0xFF, dtype=torch.uint8)
        begin = -buffer.data_ptr() % 16 + GUARD + self.offset
        self.buffers.append((buffer, begin, begin + size))
        return buffer[begin : begin + size]

    def new(self, shape: tuple[int, ...], dtype: torch.dtype, order: list[int] | None = None) -> Tensor:
        """Unwritten (NaN) memory of a dense tensor with its dimensions stored in `order`."""
        order = order or list(range(len(shape)))
        like = torch.empty_permuted(shape, order, dtype=dtype, device="meta")
        return self._place(like.numel() * dtype.itemsize).view(dtype).as_strided(like.shape, like.stride())

    def copy(self, values: Tensor | None) -> Tensor | None:
        """A dense tensor, at the same place in a buffer of its own; absent stays absent."""
        if values is None:
            return None
        return self.new(tuple(values.shape), values.dtype, memory_order(values)).copy_(values)

    def check(self) -> None:
        """No guard was written."""
        for buffer, begin, end in self.buffers:
            assert (buffer[:begin] == 0xFF).all(), "written before the beginning of a tensor"
            assert (buffer[end:] == 0xFF).all(), "written beyond the end of a tensor"


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _call(launcher: Callable[[object], bytes | None], args: ctypes.Structure, memory: Memory) -> None:
    error = launcher(ctypes.byref(args))
    assert error is None, error.decode()
    memory.check()


def _geometry(x: Tensor, source: Tensor | None, prototypes: int) -> GeometryArgs:
    outer, channels, inner = geometry(x)
    return GeometryArgs(outer, channels, inner, channels if source is None else source.shape[1], prototypes)


def shared_relu(
    x: Tensor,  # dense, as the others of its shape
    residual: Tensor | None,
    source: Tensor | None,
    gates: Tensor | None,  # packed
    pi: Tensor,
    alpha: Tensor,
    beta: Tensor,
    soft_channels: Tensor | None,
    gamma: Tensor | None,
    *,
    emit: int = 0,  # prototypes whose gates are wanted, packed
    offset: int = 0,
) -> tuple[Tensor, Tensor | None]:
    """(y, emitted gates) of the forward kernel."""
    memory, vectors = Memory(offset), Memory()
    order = memory_order(x)
    prototypes = packed_prototypes(gates) if gates is not None else emit or x.shape[1]
    source = None if source is None else in_order_of(source, x)
    y = memory.new(tuple(x.shape), x.dtype, order)
    emitted = vectors.new(packed_shape(x, emit), torch.uint8) if emit else None
    inputs = [memory.copy(t) for t in (x, residual, source)]
    small = [vectors.copy(t) for t in (gates, pi, alpha, beta, soft_channels, gamma)]
    args = ForwardArgs(DTYPES[x.dtype], _geometry(x, source, prototypes), *map(_pointer, [*inputs, *small, y, emitted]))
    _call(library().forward, args, memory)
    vectors.check()
    return y, emitted


def shared_relu_backward(
    grad: Tensor,
    x: Tensor,
    residual: Tensor | None,
    source: Tensor | None,
    gates: Tensor | None,
    pi: Tensor,
    members: Tensor,
    offsets: Tensor,
    alpha: Tensor,
    beta: Tensor,
    soft_channels: Tensor | None,
    gamma: Tensor | None,
    *,
    offset: int = 0,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """(dx, dsource, dalpha, dbeta) of the backward kernels."""
    memory, vectors = Memory(offset), Memory()
    grad = in_order_of(grad, x)
    source = None if source is None else in_order_of(source, x)
    shape = _geometry(x, source, offsets.numel() - 1)
    soft = soft_channels is not None
    dsource = None if source is None or not soft else memory.new(tuple(source.shape), x.dtype, memory_order(source))
    dx = memory.new(tuple(x.shape), x.dtype, memory_order(x))
    dalpha, dbeta = (vectors.new((x.shape[1],), alpha.dtype) for _ in range(2))
    size = library().backward_bytes(DTYPES[x.dtype], ctypes.byref(shape), soft)
    workspace = vectors.new((size,), torch.uint8)
    inputs = [memory.copy(t) for t in (grad, x, residual, source)]
    small = [vectors.copy(t) for t in (gates, pi, members, offsets, alpha, beta, soft_channels, gamma)]
    pointers = map(_pointer, [*inputs, *small, dx, dsource, dalpha, dbeta, workspace])
    _call(library().backward, BackwardArgs(DTYPES[x.dtype], shape, *pointers), memory)
    vectors.check()
    return dx, dsource, dalpha, dbeta


def masked_relu(x: Tensor, mask: Tensor, *, offset: int = 0) -> Tensor:
    """y of the forward kernel; x dense with samples first, mask in its order."""
    memory, vectors = Memory(offset), Memory()
    y = memory.new(tuple(x.shape), x.dtype, memory_order(x))
    inputs = [memory.copy(x), vectors.copy(mask)]
    args = MaskedForwardArgs(DTYPES[x.dtype], x.shape[0], mask.numel(), *map(_pointer, [*inputs, y]))
    _call(library().masked_forward, args, memory)
    return y


def masked_relu_backward(grad: Tensor, x: Tensor, mask: Tensor, *, offset: int = 0) -> tuple[Tensor, Tensor]:
    """(dx, dmask) of the backward kernels."""
    memory, vectors = Memory(offset), Memory()
    dx = memory.new(tuple(x.shape), x.dtype, memory_order(x))
    dmask = vectors.new(tuple(mask.shape), mask.dtype, memory_order(mask))
    size = library().masked_bytes(DTYPES[x.dtype], x.shape[0], mask.numel())
    workspace = vectors.new((size,), torch.uint8)
    inputs = [memory.copy(grad), memory.copy(x), vectors.copy(mask)]
    pointers = map(_pointer, [*inputs, dx, dmask, workspace])
    args = MaskedBackwardArgs(DTYPES[x.dtype], x.shape[0], mask.numel(), *pointers)
    _call(library().masked_backward, args, memory)
    vectors.check()
    return dx, dmask


def shared_relu_share(
    opened: Tensor,
    gates: Tensor,
    pi: Tensor,
    alpha: Tensor,
    beta: Tensor,
    flip: Tensor,
    scale: Tensor | None,
    offset_share: Tensor,
    toggle: Tensor,
    shift: int,
    party: int,
    *,
    offset: int = 0,
) -> Tensor:
    """y of the integer kernel; int64, dense in opened's order."""
    memory = Memory(offset)
    y = memory.new(tuple(opened.shape), torch.int64, memory_order(opened))
    flip = in_order_of(flip, opened)
    tensors = [opened, gates, pi, alpha, beta, flip, scale, offset_share, toggle]
    pointers = [_pointer(memory.copy(t)) for t in tensors]
    shape = _geometry(opened, flip, packed_prototypes(gates))
    _call(library().share, ShareArgs(shape, *pointers, shift, party, _pointer(y)), memory)
    return y


def ring_conv2d(
    x: Tensor,  # dense
    weight: Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> Tensor:
    """y of the convolution in Z_2^64."""
    memory = Memory()
    axes = []
    for d in (0, 1):
        size, kernel = x.shape[2 + d], weight.shape[2 + d]
        outputs = (size + 2 * padding[d] - dilation[d] * (kernel - 1) - 1) // stride[d] + 1
        axes.append(RingAxis(size, kernel, stride[d], padding[d], dilation[d], outputs))
    given, filters = memory.copy(x), memory.copy(weight.contiguous())
    y = memory.new((x.shape[0], weight.shape[0], axes[0].outputs, axes[1].outputs), torch.int64)
    counts = (x.shape[0], x.shape[1], weight.shape[0], groups)
    strides = (ctypes.c_int64 * 4)(*given.stride())
    args = RingConvArgs(*counts, *axes, given.data_ptr(), strides, filters.data_ptr(), None, None, False, y.data_ptr())
    _call(library().ring_conv2d, args, memory)
    return y
