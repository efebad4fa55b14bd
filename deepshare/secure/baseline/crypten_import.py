"""CrypTen 0.4.1 on a current torch."""

import importlib
import importlib.util
import sys
from types import ModuleType

from deepshare.secure.errors import SecureError

NEEDS = ("crypten", "omegaconf", "yaml", "onnx")  # modules: CrypTen, and what importing it takes: the extra `crypten`
INSTALL = "pip install 'deepshare[crypten]' && pip install --no-deps crypten==0.4.1"


def missing_modules() -> list[str]:
    """Those of NEEDS that are not installed; imports nothing."""
    return [name for name in NEEDS if importlib.util.find_spec(name) is None]


def require_crypten() -> None:
    """Raises SecureError with the install command if CrypTen or what it needs is absent; imports nothing."""
    if missing := missing_modules():
        raise SecureError(
            f"secure: the baseline needs {', '.join(missing)}, not installed; "
            f"as CrypTen's own requirements are broken: {INSTALL}"
        )


def load_crypten() -> ModuleType:
    """Imports CrypTen, and sets it up to count.

    CrypTen imports `torch.onnx._internal.registration`, which torch moved; the module is put under its old name
    first. Its counters read zero unless `communicator.verbose` is set before the operations.
    """
    require_crypten()
    old = "torch.onnx._internal.registration"
    if old not in sys.modules and importlib.util.find_spec(old) is None:
        sys.modules[old] = importlib.import_module("torch.onnx._internal.torchscript_exporter.registration")
    crypten = importlib.import_module("crypten")
    crypten.cfg.communicator.verbose = True
    return crypten
