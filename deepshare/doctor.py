"""What is installed, what is used for which device, and why: the text of `deepshare doctor`."""

import importlib.metadata
import os
import platform
import sys
from collections.abc import Callable, Iterator

_BACKEND_NAMES = {"reference": "plain PyTorch", "cpu": "C++", "triton": "Triton", "cuda": "C++/CUDA"}
_OPTIONAL = {
    "matplotlib": "pictures of the demo, of compare and of report (pip install 'deepshare[demo]')",
    "scikit-learn": "the digits of the demo (pip install 'deepshare[demo]')",
}


def report() -> str:
    """The whole report. Never raises: a part that fails says so in its place."""
    sections: dict[str, Callable[[], Iterator[str]]] = {
        "deepshare": _package,
        "torch": _torch,
        "Native part (deepshare._C)": _native,
        "Triton": _triton,
        "Backends of shared_relu": _backends,
        "Used for tensors on": _choice,
        "Two-party inference (deepshare secure)": _secure,
        "CrypTen (its baseline)": _crypten,
        "Optional packages": _optional,
    }
    return "\n".join(line for title, section in sections.items() for line in (title, *_indented(section)))


def _indented(section: Callable[[], Iterator[str]]) -> list[str]:
    lines = []
    try:
        for line in section():
            lines.append(f"  {line}")
    except Exception as error:  # the report is for installations that are broken in unknown ways
        lines.append(f"  failed: {type(error).__name__}: {error}")
    return lines


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _package() -> Iterator[str]:
    import deepshare

    yield f"{deepshare.__version__} in {os.path.dirname(deepshare.__file__)}"
    yield f"Python {platform.python_version()} ({sys.executable}) on {platform.platform()}"


def _torch() -> Iterator[str]:
    import torch

    yield f"{torch.__version__}, {torch.get_num_threads()} CPU threads"
    if torch.version.cuda is None:
        yield "built without CUDA"
        return
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    yield f"built with CUDA {torch.version.cuda}, {count} CUDA devices"
    for index in range(count):
        major, minor = torch.cuda.get_device_capability(index)
        yield f"cuda:{index}: {torch.cuda.get_device_name(index)}, sm_{major}{minor}"


def _native() -> Iterator[str]:
    import deepshare
    from deepshare.kernels import native
    from deepshare.raw_ops import dcf_missing

    module = native.load()
    if module is None:
        yield f"not loaded: {native.why_not()}"
        return
    info = module.build_info()
    yield f"{info['version']}, {module.__file__}"
    if info["version"] != deepshare.__version__:
        yield f"STALE: it is of {info['version']}, the package of {deepshare.__version__}: build again (docs/build.md)"
    yield f"compiled by {info['compiler']} against torch {info['torch']}"
    extensions = ", ".join(info["cpu_instruction_sets"]) or "no known extensions"
    yield f"CPU kernels {info['cpu_kernels']}; this processor has {extensions}"
    yield f"DCF gates: {dcf_missing() or 'by ' + info['aes_kernels']}"
    if info["cuda_toolkit"] is None:
        yield "no CUDA kernels: no nvcc when it was built, or DEEPSHARE_CUDA=never"
    else:
        built = ", ".join(info["cuda_architectures"])
        yield f"CUDA kernels by toolkit {info['cuda_toolkit']}: {built}, PTX {info['cuda_ptx']}"


def _triton() -> Iterator[str]:
    version = _version("triton")
    yield "not installed (pip install triton)" if version is None else version
    if os.environ.get("TRITON_INTERPRET") == "1":
        yield "TRITON_INTERPRET=1: its kernels run in Python, also on CPU tensors; for tests"


def _backends() -> Iterator[str]:
    from deepshare.raw_ops import backends

    for name, reason in backends().items():
        state = "available" if reason is None else f"not available: {reason}"
        yield f"{name:<10}{_BACKEND_NAMES.get(name, ''):<14}{state}"


def _choice() -> Iterator[str]:
    from deepshare.raw_ops import backends, default_backend

    missing = {name for name, reason in backends().items() if reason is not None}
    for device, preferred in (("cpu", ("cpu",)), ("cuda", ("cuda", "triton"))):
        chosen = default_backend(device)
        passed = [name for name in preferred if name in missing]
        yield f"{device:<10}{chosen} ({' and '.join(passed) + ' not available' if passed else 'the first choice'})"


def _secure() -> Iterator[str]:
    """Engine, dealer and links: what they take beside torch."""
    version = _version("cryptography")
    if version is None:
        yield "cryptography missing: neither dealer nor links between machines; pip install 'deepshare[secure]'"
        return
    from cryptography.hazmat.backends.openssl import backend

    yield f"cryptography {version}, {backend.openssl_version_text()}"


def _crypten() -> Iterator[str]:
    from deepshare.secure.baseline.crypten_import import INSTALL, load_crypten, missing_modules

    if missing := missing_modules():
        yield f"missing: {', '.join(missing)}"
        yield f"install: {INSTALL}"
        yield "(deepshare[crypten] holds what it needs: its own requirements name a withdrawn package)"
        return
    module = load_crypten()
    yield f"{_version('crypten')}, loads ({os.path.dirname(module.__file__ or '')})"


def _optional() -> Iterator[str]:
    for distribution, use in _OPTIONAL.items():
        yield f"{distribution:<14}{_version(distribution) or 'not installed'}: {use}"
