"""Settings every test relies on; they must stand before torch, triton or deepshare is imported."""

import os
import shutil
from importlib.util import find_spec
from pathlib import Path

GPU = shutil.which("nvidia-smi") is not None
if not GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton kernels run on CPU tensors, in Python
os.environ["DEEPSHARE_POISON"] = "1"  # what the CPU ops allocate comes filled with NaN, like torch.empty below

import pytest  # noqa: E402
import torch  # noqa: E402
from interpreter import patch_once  # noqa: E402

SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if item.get_closest_marker("shared") and not SHARED.is_dir():
            item.add_marker(pytest.mark.skip(reason="needs ../shared (papers, figures, data), which users do not have"))


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """../shared: only for tests with the marker `shared`."""
    return SHARED


@pytest.fixture(scope="module")
def one_thread():
    """For modules that train: layers this small only wait for each other in several threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def poisoned_buffers():
    """torch.empty comes filled with NaN, so that an unwritten output is loud (DESIGN, facts measured)."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def quick_interpreter(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests of the Triton backend, by their name, run it without its repeated work."""
    if os.environ.get("TRITON_INTERPRET") == "1" and "triton" in request.node.nodeid and find_spec("triton"):
        patch_once(monkeypatch)
