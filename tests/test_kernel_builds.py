"""The compile checks of scripts/check-kernels on one architecture, and that they can fail."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "scripts"
NO_NVCC = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the PATH")
NO_TRITON = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

# By its name (V = 4) a vector kernel; it moves single floats, and keeps an array that it indexes at run time.
PLANTED = """
template <class T, int V>
__global__ void planted(const T* x, T* y, const int* at, int n) {
  T kept[64] = {};
  for (int i = 0; i < n; ++i) kept[at[i] & 63] += x[i];
  for (int i = 0; i < n; ++i) y[i] = kept[at[n + i] & 63];
}
template __global__ void planted<float, 4>(const float*, float*, const int*, int);
"""


def check_kernels(*arguments: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPTS / "check-kernels"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@NO_NVCC
@NO_TRITON  # its wheel brings cuobjdump and nvdisasm
def test_cuda_forward_compiles_without_spills_and_with_wide_accesses():
    done = check_kernels("--backend", "cuda", "--only", "forward", "--arch", "90")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "64 kernels, 0 violations" in done.stdout


@NO_TRITON
def test_triton_columns_compile_without_spills_and_with_wide_accesses():
    done = check_kernels("--backend", "triton", "--only", "forward_columns odd", "--arch", "90")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "8 kernels, 0 violations" in done.stdout
    # 4 of 128 bits: two of x and two of the gates' leaders, which need the branch in triton_columns.load_leaders
    (plain,) = [line for line in done.stdout.splitlines() if line.startswith("triton forward_columns odd   ")][:1]
    assert plain.split()[-1] == "4/2", plain


@NO_NVCC
@NO_TRITON
def test_a_planted_kernel_violates_every_rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import cuda_builds

    (tmp_path / "planted.cu").write_text(PLANTED)
    (built,) = cuda_builds.build([90], tmp_path / "cache", folder=tmp_path)
    assert (built.name, built.dtype, built.wide) == ("planted<4>", "float", True)
    wrong = " ".join(built.violations())
    for part in ("spills", "stack frame", "no 16-byte load", "no 16-byte store"):
        assert part in wrong


# The bounds check lets the compiler move the second load behind the first store.
PLANTED_LATE = """
template <class T, int V>
__global__ void hard_rows(const float4* x, float4* y, int n) {
  const float4 first = __ldg(x + threadIdx.x), second = __ldg(x + threadIdx.x + 256);
  y[threadIdx.x] = first;
  if (n > 256) y[threadIdx.x + 256] = second;
}
template __global__ void hard_rows<float, 4>(const float4*, float4*, int);
"""


@NO_NVCC
@NO_TRITON
def test_a_load_behind_the_first_store_is_a_violation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import cuda_builds

    (tmp_path / "late.cu").write_text(PLANTED_LATE)
    (built,) = cuda_builds.build([90], tmp_path / "cache", folder=tmp_path)
    assert "1 16-byte loads behind the first store" in " ".join(built.violations())
