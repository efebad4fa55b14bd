"""setup.py and the wheel, run through setuptools' build backend as pip runs it; `deepshare doctor`."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import deepshare.raw_ops
from deepshare import doctor

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("setup.py", "pyproject.toml", "CMakeLists.txt", "MANIFEST.in", "README.md", "LICENSE")
FOLDERS = ("csrc", "kernels", "recipes", "deepshare")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The package's sources without what was built from them."""
    copy = tmp_path / "tree"
    copy.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_file():
            shutil.copy(ROOT / name, copy)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return copy


@pytest.fixture
def no_compiler(tmp_path: Path) -> str:
    """A PATH without any program."""
    (tmp_path / "bin").mkdir()
    return str(tmp_path / "bin")


def backend(tree: Path, hook: str, **environment: str) -> subprocess.CompletedProcess:
    """Call a hook of the build backend in the tree; its last line of output is what the hook returns."""
    code = f"import setuptools.build_meta as backend; print(backend.{hook})"
    unset = ("CXX", "CUDACXX", "DEEPSHARE_BUILD", "DEEPSHARE_CUDA")
    variables = {name: value for name, value in os.environ.items() if name not in unset}
    variables |= {"DEEPSHARE_CUDA": "never", **environment}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=tree, env=variables, capture_output=True, text=True, check=False
    )


def wheel_names(tree: Path) -> list[str]:
    (wheel,) = (tree / "dist").glob("*.whl")
    return zipfile.ZipFile(wheel).namelist()


def test_the_symlinks_stand():
    assert os.readlink(ROOT / "deepshare/kernels") == "../kernels"
    assert os.readlink(ROOT / "deepshare/recipes") == "../recipes"


@pytest.mark.parametrize("name", ["DEEPSHARE_BUILD", "DEEPSHARE_CUDA"])
def test_a_wrong_setting_is_named(tree: Path, name: str):
    done = backend(tree, "get_requires_for_build_wheel()", **{name: "maybe"})
    assert done.returncode != 0
    assert f"{name} must be auto, require or never (got 'maybe')" in done.stderr
    assert not (tree / "dist").exists()


def test_a_pure_wheel_installs_deepshare_alone(tree: Path):
    assert backend(tree, "get_requires_for_build_wheel()", DEEPSHARE_BUILD="never").stdout.splitlines()[-1] == "[]"
    done = backend(tree, "build_wheel('dist')", DEEPSHARE_BUILD="never")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"deepshare-{deepshare.__version__}-py3-none-any.whl"
    names = wheel_names(tree)
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"deepshare"}
    wanted = {"deepshare/kernels/reference.py", "deepshare/kernels/native.py", "deepshare/py.typed"}
    wanted.add("deepshare/budget/published.csv")
    assert wanted | {f"deepshare/recipes/{path.name}" for path in (ROOT / "recipes").glob("*.toml")} <= set(names)
    assert not [name for name in names if name.endswith((".so", ".cu", ".cuh", ".h", ".cpp"))]


def test_without_a_compiler_auto_warns_and_installs_and_require_fails(tree: Path, no_compiler: str):
    environment = {"PATH": no_compiler}
    assert backend(tree, "get_requires_for_build_wheel()", **environment).stdout.splitlines()[-1] == "[]"
    required = backend(tree, "build_wheel('dist')", DEEPSHARE_BUILD="require", **environment)
    assert required.returncode != 0
    assert "deepshare: DEEPSHARE_BUILD=require, but no C++ compiler was found" in required.stderr
    assert not list(tree.glob("dist/*.whl"))
    done = backend(tree, "build_wheel('dist')", **environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].endswith("py3-none-any.whl")
    assert done.stderr.count("WARNING: deepshare: no C++ compiler was found") == 1


def compiler_folder(folder: Path) -> str:
    """A folder whose only program is a C++ compiler that cannot compile."""
    folder.mkdir(exist_ok=True)
    compiler = folder / "c++"
    compiler.write_text("#!/bin/sh\nexit 1\n")
    compiler.chmod(0o755)
    return str(folder)


NEEDS_PYTHON_H = pytest.mark.skipif(
    not (Path(sysconfig.get_path("include")) / "Python.h").is_file(), reason="without Python.h nothing is required"
)


@NEEDS_PYTHON_H
def test_with_a_compiler_the_missing_tools_are_required(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    # An isolated environment has neither: only tools beside this interpreter may be found in addition.
    done = backend(tree, "get_requires_for_build_wheel()", PATH=compiler_folder(tmp_path / "bin"))
    scripts = Path(sysconfig.get_path("scripts"))
    wanted = [tool for tool in ("cmake>=3.24", "ninja>=1.10") if not (scripts / tool.partition(">")[0]).exists()]
    assert done.stdout.splitlines()[-1] == str(wanted)


@NEEDS_PYTHON_H
def test_a_failing_build_leaves_out_a_library_of_an_earlier_one(tree: Path, tmp_path: Path):
    path = os.pathsep.join([compiler_folder(tmp_path / "bin"), os.environ["PATH"]])
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    (tree / f"deepshare/_C{suffix}").write_bytes(b"stale")
    done = backend(tree, "build_wheel('dist')", PATH=path)
    assert done.returncode == 0, done.stderr
    assert "WARNING: deepshare:" in done.stderr
    assert not [name for name in wheel_names(tree) if name.endswith(".so")]


@pytest.mark.slow
def test_the_native_wheel_has_one_library(tree: Path):
    done = backend(tree, "build_wheel('dist')", DEEPSHARE_BUILD="require")
    assert done.returncode == 0, done.stdout + done.stderr
    libraries = [name for name in wheel_names(tree) if name.endswith(".so")]
    assert libraries == [f"deepshare/_C{sysconfig.get_config_var('EXT_SUFFIX')}"]


def test_doctor_names_every_part_and_the_choice():
    lines = doctor.report().splitlines()
    titles = [line for line in lines if not line.startswith(" ")]
    assert titles == [
        "deepshare",
        "torch",
        "Native part (deepshare._C)",
        "Triton",
        "Backends of shared_relu",
        "Used for tensors on",
        "Two-party inference (deepshare secure)",
        "CrypTen (its baseline)",
        "Optional packages",
    ]
    assert not [line for line in lines if line.startswith("  failed")]
    assert any(line.startswith(f"  cpu       {deepshare.raw_ops.default_backend('cpu')} (") for line in lines)


def test_doctor_survives_a_broken_part(monkeypatch: pytest.MonkeyPatch):
    def broken():
        raise RuntimeError("torch is damaged")
        yield

    monkeypatch.setattr(doctor, "_torch", broken)
    lines = doctor.report().splitlines()
    assert lines[lines.index("torch") + 1] == "  failed: RuntimeError: torch is damaged"
    assert "Optional packages" in lines


def test_doctor_gives_the_commands_for_crypten(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("deepshare.secure.baseline.crypten_import.NEEDS", ("crypten_that_nobody_has",))
    report = doctor.report()
    assert "missing: crypten_that_nobody_has" in report
    assert "pip install 'deepshare[crypten]' && pip install --no-deps crypten==" in report


def test_doctor_says_whether_cryptography_is_there(monkeypatch: pytest.MonkeyPatch):
    assert re.search(r"^  cryptography \d+\.\S+, OpenSSL ", doctor.report(), re.MULTILINE)
    version = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "cryptography" else version(name))
    assert "cryptography missing" in doctor.report()
    assert "pip install 'deepshare[secure]'" in doctor.report()
