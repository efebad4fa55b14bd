"""Lazy load of `deepshare._C`, the compiled part: importing it registers the raw ops' CPU and CUDA implementations."""

import importlib
from functools import cache
from types import ModuleType

_MODULE = "deepshare._C"
_CHOICE = "DEEPSHARE_CPU_ISA"  # chooses among the library's CPU kernels (csrc/cpu/dispatch.cpp)
_HOW_TO_BUILD = "build it with `DEEPSHARE_BUILD=require pip install -e .` in the source tree (docs/build.md)"


@cache
def _attempt() -> tuple[ModuleType | None, str]:
    """(module, "") or (None, reason); one attempt per process.

    Raises:
        ImportError: the library refuses DEEPSHARE_CPU_ISA; the reference in its place would not be what was asked for.
    """
    try:
        return importlib.import_module(_MODULE), ""
    except ModuleNotFoundError as error:
        if error.name != _MODULE:
            return None, f"{_MODULE} needs the module {error.name!r}, which is missing"
        return None, f"{_MODULE} was not built for this Python; {_HOW_TO_BUILD}"
    except Exception as error:  # one built for another torch or machine fails in ways of its own, none of them fatal
        if _CHOICE in str(error):
            raise ImportError(str(error)) from None
        return None, f"{_MODULE} does not load: {type(error).__name__}: {error}; {_HOW_TO_BUILD}"


def load() -> ModuleType | None:
    """The module `deepshare._C`, or None where it is absent or broken; `why_not()` then says why.

    Raises:
        ImportError: the environment variable DEEPSHARE_CPU_ISA names no build that runs on this processor.
    """
    return _attempt()[0]


def why_not() -> str:
    """Why `load()` returns None; the empty string where it does not."""
    return _attempt()[1]
