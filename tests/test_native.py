"""deepshare._C: the raw ops on CPU tensors, their memory formats, their bits, and its loading."""

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from operator_cases import assert_agrees, inputs, random_case, run
from torch import Tensor

import deepshare
from deepshare import ChannelMap
from deepshare.kernels import native, reference

NATIVE = pytest.mark.skipif(
    native.load() is None and os.environ.get("DEEPSHARE_BUILD") != "require", reason=native.why_not() or "loaded"
)
OPS = torch.ops.deepshare

# [N, C, *S], prototypes: many blocks of short rows, rows of several pieces, pixels, and very short rows
SHAPES = [((5, 12, 33, 16), 5), ((3, 4, 9001), 2), ((9000, 7), 3), ((70, 33, 3, 3), 33)]


def case(
    shape: tuple[int, ...], prototypes: int, dtype: torch.dtype, soft: int | None, with_source: bool, seed: int = 0
):
    """(grad, the raw forward's arguments, members, offsets) with a random map."""
    generator = torch.Generator().manual_seed(len(shape))
    channels = shape[1]
    pi = torch.randint(prototypes, (channels,), generator=generator, dtype=torch.int32)
    channel_map = ChannelMap(pi, prototypes)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x, grad = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    alpha, beta = (torch.randn(channels, generator=generator).to(wide) for _ in range(2))
    source = torch.randn((shape[0], prototypes + 1, *shape[2:]), generator=generator).to(dtype) if with_source else None
    switch = None if soft is None else torch.tensor(soft, dtype=torch.int32)
    gamma = None if soft is None else torch.tensor(1.5, dtype=wide)
    return grad, [x, source, channel_map.pi, alpha, beta, switch, gamma], channel_map.members, channel_map.offsets


def both(grad: Tensor, forward: list, members: Tensor, offsets: Tensor, ops: tuple) -> list[Tensor]:
    """y, dx, dsource, dalpha, dbeta of one implementation."""
    x, source, pi, *rest = forward
    operands = (x, None, source, None, pi)
    return [ops[0](*operands, *rest), *ops[1](grad, *operands, members, offsets, *rest)]


def native_results(arguments: tuple) -> list[Tensor]:
    return both(*arguments, ops=(OPS.shared_relu_native, OPS.shared_relu_backward_native))


@NATIVE
@pytest.mark.parametrize("block", range(8))
def test_larger_random_cases_agree_with_the_reference(block: int):
    for number in range(10_000 + 15 * block, 10_000 + 15 * (block + 1)):
        drawn = random_case(number, largest=30_000)
        given = inputs(drawn)
        assert_agrees(drawn, given, run(drawn, given, "cpu"), run(drawn, given, "reference"), truncating=False)


@NATIVE
@pytest.mark.parametrize("with_source", [False, True])
@pytest.mark.parametrize("soft", [None, 0, 2])
@pytest.mark.parametrize(("shape", "prototypes"), SHAPES)
def test_blocks_and_pieces_add_up(shape, prototypes: int, soft, with_source: bool):
    arguments = case(shape, prototypes, torch.float64, soft, with_source)
    expected = both(*arguments, ops=(reference.shared_relu, reference.shared_relu_backward))
    for got, wanted in zip(native_results(arguments), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-11)


@NATIVE
@pytest.mark.parametrize("soft", [None, 3])
@pytest.mark.parametrize(("shape", "prototypes"), SHAPES)
def test_bits_do_not_depend_on_the_number_of_threads(shape, prototypes: int, soft):
    arguments = case(shape, prototypes, torch.float32, soft, with_source=False)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(native_results(arguments))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def digest() -> str:
    """A hash of the bits of many results."""
    seen = hashlib.sha256()
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        for shape, prototypes in SHAPES:
            for soft in (None, 3):
                for result in native_results(case(shape, prototypes, dtype, soft, with_source=soft is None)):
                    seen.update(result.contiguous().view(torch.uint8).numpy().tobytes())
    return seen.hexdigest()


def in_fresh_process(code: str, **environment: str) -> list[str]:
    """The lines that Python code prints under this process's path and environment, with the given variables."""
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    variables = {**os.environ, "PYTHONPATH": path, **environment}
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@NATIVE
def test_bits_do_not_depend_on_the_instruction_set():
    builds = ["baseline", "x86_64_v3", "x86_64_v4"]
    own = native.load().build_info()["cpu_kernels"]
    for narrower in builds[: builds.index(own)]:
        code = "import test_native as t; print(t.native.load().build_info()['cpu_kernels'], t.digest())"
        assert in_fresh_process(code, DEEPSHARE_CPU_ISA=narrower) == [f"{narrower} {digest()}"]


@NATIVE
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 65_536), (65_536, 1)])
def test_every_16_bit_value_is_read_and_rounded_as_torch_does(dtype: torch.dtype, shape: tuple[int, ...]):
    values = torch.arange(65_536, dtype=torch.int32).to(torch.int16).view(dtype)
    zero, pi = torch.zeros(1), torch.zeros(1, dtype=torch.int32)
    for factor in (1.0, 1.0009766, 0.3333, 0.5, 3e-5, 70_000.0, -1e-3, 1e38):
        beta = torch.tensor([factor])
        got = OPS.shared_relu_native(values.view(shape), None, None, None, pi, zero, beta, None, None).flatten()
        wanted = (values.float() * beta).to(dtype)
        assert torch.equal(got.isnan(), wanted.isnan())
        assert torch.equal(got.nan_to_num().view(torch.int16), wanted.nan_to_num().view(torch.int16))


@NATIVE
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1), (3, 1, 0, 2), (1, 0, 2, 3), (2, 3, 0, 1)])
@pytest.mark.parametrize("source_order", [(0, 1, 2, 3), (0, 2, 3, 1), (3, 2, 1, 0)])
def test_outputs_have_the_strides_of_their_inputs(order, source_order):
    grad, forward, members, offsets = case((3, 6, 4, 5), 2, torch.float64, soft=4, with_source=True)
    expected = both(grad, forward, members, offsets, (reference.shared_relu, reference.shared_relu_backward))

    def stored(tensor: Tensor, dims) -> Tensor:
        return tensor.permute(dims).contiguous().permute([dims.index(d) for d in range(4)])

    forward[0], forward[1] = stored(forward[0], order), stored(forward[1], source_order)
    results = native_results((grad, forward, members, offsets))
    for got, like in zip(results, [forward[0], forward[0], forward[1]], strict=False):
        assert got.stride() == like.stride()
    for got, wanted in zip(results, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


@NATIVE
def test_build_info_tells_how_it_was_built():
    info = native.load().build_info()
    assert info["version"] == deepshare.__version__
    assert info["compiler"].split()[0] in ("gcc", "clang")
    assert info["torch"].startswith("2.")
    assert (info["cuda_toolkit"] is None) == (info["cuda_architectures"] == []) == (info["cuda_ptx"] is None)
    assert all(architecture.startswith("sm_") for architecture in info["cuda_architectures"])
    if info["cpu_kernels"] == "x86_64_v4":
        assert {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= set(info["cpu_instruction_sets"])


@NATIVE
def test_a_wrong_instruction_set_is_an_error_that_names_the_variable():
    code = "try:\n    import deepshare\nexcept ImportError as error:\n    print(error)"
    (message,) = in_fresh_process(code, DEEPSHARE_CPU_ISA="bogus")
    assert re.fullmatch(r"DEEPSHARE_CPU_ISA must be one of .*baseline.* on this processor \(got 'bogus'\)", message)


@pytest.mark.parametrize("kind", ["OSError", "ImportError"])
def test_without_the_library_the_reference_serves_and_says_why(kind: str):
    code = (
        "import sys\n"
        "class Broken:\n"
        "    def find_spec(self, name, path, target=None):\n"
        f"        if name == 'deepshare._C': raise {kind}('undefined symbol: aoti_x')\n"
        "sys.meta_path.insert(0, Broken())\n"
        "import torch, deepshare; from deepshare import raw_ops; from deepshare.kernels import native\n"
        "print(deepshare.SharedReLU2d(4, 2)(torch.ones(1, 4, 2, 2)).sum().item(), raw_ops.default_backend('cpu'))\n"
        "print(native.why_not())"
    )
    first, reason = in_fresh_process(code)
    assert first == "16.0 reference"
    assert f"deepshare._C does not load: {kind}: undefined symbol: aoti_x; build it" in reason


def test_an_absent_library_says_how_to_build_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "deepshare._C", None)
    module, reason = native._attempt.__wrapped__()
    assert module is None
    assert reason.startswith("deepshare._C was not built for this Python; build it with")
    assert "pip install" in reason
