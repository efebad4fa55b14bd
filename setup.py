"""Installs the package and builds deepshare._C with CMake and Ninja. Settings, each also in docs/build.md:

DEEPSHARE_BUILD=auto     build the native part; where it cannot be built, warn and install without it (default)
DEEPSHARE_BUILD=require  build it or fail        DEEPSHARE_BUILD=never  do not try
DEEPSHARE_CUDA=auto      compile the CUDA kernels wherever nvcc is found (default); require, never likewise
"""

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
OLDEST_TORCH = (2, 11)
# For an isolated build when the target environment has none; the result loads on every torch since OLDEST_TORCH.
BUILD_TORCH = "torch==2.13.0"
OLDEST_CMAKE = (3, 24)
OLDEST_NINJA = (1, 10)


class BuildError(Exception):
    """Why the native part cannot be built, as a sentence for the person who installs."""


def setting(name: str) -> str:
    """auto, require or never, from the environment."""
    value = os.environ.get(name, "") or "auto"
    if value not in ("auto", "require", "never"):
        raise SystemExit(f"{name} must be auto, require or never (got {value!r})")
    return value


def numbers(version: str) -> tuple[int, ...]:
    """(2, 13, 0) of "2.13.0+cpu"."""
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3])


def dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def find_compiler() -> str | None:
    """Path of the C++ compiler, CXX first."""
    named = os.environ.get("CXX")
    names = [named.split()[0]] if named else ["c++", "g++", "clang++"]
    return next((path for path in map(shutil.which, names) if path), None)


def obstacle() -> str | None:
    """What stands against a native build and cannot be had from PyPI, or None."""
    if platform.system() != "Linux":
        return f"the native part is built on Linux only (this is {platform.system()})"
    if find_compiler() is None:
        return "no C++ compiler was found (CXX, c++, g++ or clang++)"
    include = Path(sysconfig.get_path("include"))
    if not (include / "Python.h").is_file():
        return f"Python.h was not found in {include} (a package like python3-dev has it)"
    return None


def find_torch() -> Path | None:
    """The installed torch package, found without importing it.

    platlib first: under pip's build isolation it is still the folder of the environment installed into, whose torch is
    the one to build against, while torch itself cannot be imported.
    """
    folders = [Path(sysconfig.get_path("platlib")) / "torch"]
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.origin is not None:
        folders.append(Path(spec.origin).parent)
    return next((folder for folder in folders if torch_version(folder)[:2] >= OLDEST_TORCH), None)


def torch_version(folder: Path) -> tuple[int, ...]:
    """(2, 13, 0) of an installed torch, () where there is none."""
    return numbers(torch_version_text(folder))


def torch_version_text(folder: Path) -> str:
    path = folder / "version.py"
    found = re.search(r"__version__ = '([^']+)'", path.read_text()) if path.is_file() else None
    return found.group(1) if found else ""


def find_tool(name: str, oldest: tuple[int, ...]) -> str | None:
    """Path of cmake or ninja, if it runs.

    Under build isolation the target environment's scripts may be on PATH without the packages they import.
    """
    for path in (shutil.which(name), shutil.which(name, path=sysconfig.get_path("scripts"))):
        if path is None:
            continue
        answer = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
        if answer.returncode == 0 and numbers(re.sub(r"^[^\d]*", "", answer.stdout))[:2] >= oldest:
            return path
    return None


def find_nvcc() -> str | None:
    """Path of nvcc: CUDACXX, CUDA_HOME, PATH, then the usual folder."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    in_homes = [f"{home}/bin/nvcc" for home in homes if home]
    candidates = [os.environ.get("CUDACXX"), *in_homes, "nvcc", "/usr/local/cuda/bin/nvcc"]
    return next((path for path in map(shutil.which, filter(None, candidates)) if path), None)


def find_pybind11(torch: Path) -> Path | None:
    """Folder that holds pybind11's headers: the package's, else the copy that torch brings."""
    spec = importlib.util.find_spec("pybind11")
    folders = [torch / "include"]
    if spec is not None and spec.origin is not None:
        folders.insert(0, Path(spec.origin).parent / "include")
    return next((folder for folder in folders if (folder / "pybind11/pybind11.h").is_file()), None)


def build_requirements() -> list[str]:
    """What pip must put into an isolated build environment: nothing where no native build will be tried."""
    if setting("DEEPSHARE_BUILD") == "never" or obstacle() is not None:
        return []
    torch = find_torch()
    wanted = {
        "pybind11>=2.12": torch is None or find_pybind11(torch) is None,
        f"cmake>={dotted(OLDEST_CMAKE)}": find_tool("cmake", OLDEST_CMAKE) is None,
        f"ninja>={dotted(OLDEST_NINJA)}": find_tool("ninja", OLDEST_NINJA) is None,
        BUILD_TORCH: torch is None,
    }
    return [requirement for requirement, missing in wanted.items() if missing]


def warn(reason: str, consequence: str) -> None:
    line = "=" * 100
    print(f"\n{line}\nWARNING: deepshare: {reason}\n{consequence}\n{line}\n", file=sys.stderr, flush=True)


PURE_PYTHON = (
    "Installing without the native part: reference kernels on CPU, Triton on GPU. DEEPSHARE_BUILD=require makes this "
    "an error, DEEPSHARE_BUILD=never silences it; `deepshare doctor` shows what is used."
)


class NativeBuild(build_ext):
    """build_ext by CMake; with DEEPSHARE_BUILD=auto a failure leaves the extension out."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        try:
            self._build(target)
        except BuildError as error:
            if setting("DEEPSHARE_BUILD") == "require":
                raise SystemExit(f"deepshare: DEEPSHARE_BUILD=require, but {error}") from None
            warn(str(error), PURE_PYTHON)
            target.unlink(missing_ok=True)
            if self.editable_mode:  # the library of an earlier build would be imported in place of none
                (ROOT / self.get_ext_filename(ext.name)).unlink(missing_ok=True)

    def _build(self, target: Path) -> None:
        reason = obstacle()
        if reason is not None:
            raise BuildError(reason)
        settings = self._settings(target.name)
        nvcc = self._nvcc()
        try:
            folder = run_cmake(settings, nvcc)
        except BuildError as error:
            if nvcc is None or "require" in (setting("DEEPSHARE_BUILD"), setting("DEEPSHARE_CUDA")):
                raise
            warn(f"with {nvcc}, {error}", "Building without CUDA; DEEPSHARE_CUDA=never does so at once.")
            folder = run_cmake(settings, None)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(folder / target.name, target)

    def _settings(self, module: str) -> dict[str, object]:
        torch = find_torch()
        if torch is None:
            raise BuildError(f"no torch >= {dotted(OLDEST_TORCH)} is installed to build against")
        cmake, ninja = find_tool("cmake", OLDEST_CMAKE), find_tool("ninja", OLDEST_NINJA)
        tools = {"cmake": cmake, "ninja": ninja, "pybind11": find_pybind11(torch)}
        missing = [name for name, path in tools.items() if path is None]
        if missing:
            raise BuildError(f"without build isolation these must be installed: {', '.join(missing)}")
        return {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_CXX_COMPILER": find_compiler(),
            "CMAKE_MAKE_PROGRAM": tools["ninja"],
            "DEEPSHARE_MODULE": module,
            "DEEPSHARE_VERSION": self.distribution.get_version(),
            "DEEPSHARE_PYTHON_INCLUDE": sysconfig.get_path("include"),
            "DEEPSHARE_PYBIND11_INCLUDE": tools["pybind11"],
            "DEEPSHARE_TORCH": torch,
            "DEEPSHARE_TORCH_VERSION": torch_version_text(torch),
        }

    def _nvcc(self) -> str | None:
        wish = setting("DEEPSHARE_CUDA")
        nvcc = None if wish == "never" else find_nvcc()
        if nvcc is None and wish == "require":
            raise BuildError("DEEPSHARE_CUDA=require and no nvcc was found (CUDACXX, CUDA_HOME, PATH, /usr/local/cuda)")
        return nvcc


def run_cmake(settings: dict[str, object], nvcc: str | None) -> Path:
    """Configures and builds; returns the build folder, which is used again only with the settings it was made with."""
    cuda = {"DEEPSHARE_WITH_CUDA": "ON", "CMAKE_CUDA_COMPILER": nvcc} if nvcc else {"DEEPSHARE_WITH_CUDA": "OFF"}
    arguments = [f"-D{name}={value}" for name, value in {**settings, **cuda}.items()]
    folder = ROOT / "build" / f"native-{sys.implementation.cache_tag}"
    stamp, text = folder / "settings.txt", "\n".join(arguments)
    if not stamp.is_file() or stamp.read_text() != text:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        stamp.write_text(text)
    cmake = find_tool("cmake", OLDEST_CMAKE)
    assert cmake is not None, "checked by NativeBuild._settings"
    configure = [cmake, "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", *arguments]
    for step in (configure, [cmake, "--build", str(folder)]):
        print("+", *step, flush=True)
        try:
            subprocess.run(step, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise BuildError(f"the native build failed (its output stands above): {error}") from None
    return folder


class CleanBuild(build):
    """Starts from an empty folder: what an earlier build left there would go into the wheel."""

    def run(self) -> None:
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


def extensions() -> list[Extension]:
    mode = setting("DEEPSHARE_BUILD")
    setting("DEEPSHARE_CUDA")  # a wrong value is an error even where nothing is built
    reason = obstacle()
    if mode == "auto" and reason is not None and {"build", "bdist_wheel", "editable_wheel"} & set(sys.argv):
        warn(reason, PURE_PYTHON)  # once: pip runs this file for the requirements and the metadata too
    if mode == "never" or (mode == "auto" and reason is not None):
        return []
    return [Extension("deepshare._C", sources=[], optional=mode == "auto")]


setup(
    ext_modules=extensions(),
    setup_requires=build_requirements(),
    cmdclass={"build": CleanBuild, "build_ext": NativeBuild},
)
