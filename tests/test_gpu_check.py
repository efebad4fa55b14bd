"""scripts/gpu-check without a GPU: its driver makes valid calls, its results are kept where they belong."""

import importlib.machinery
import importlib.util
import json
import shutil
from pathlib import Path
from types import ModuleType

import pytest
from operator_cases import random_case

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "tests" / "records" / "bench.json"


def script(name: str) -> ModuleType:
    path = ROOT / "scripts" / name
    loader = importlib.machinery.SourceFileLoader(path.stem.replace("-", "_"), str(path))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def test_the_driver_exercises_every_operator(monkeypatch: pytest.MonkeyPatch):
    driver, called = script("gpu_driver.py"), set()
    for name in ("shared_relu", "masked_relu", "shared_relu_share"):
        function = getattr(driver, name)
        monkeypatch.setattr(driver, name, lambda *a, _f=function, _n=name, **k: (called.add(_n), _f(*a, **k))[1])
    for number in range(driver.CASES):
        driver.exercise(random_case(number, largest=200), "cpu", "reference")
    assert called == {"shared_relu", "masked_relu", "shared_relu_share"}


def test_results_are_kept_by_the_name_of_the_gpu(tmp_path: Path):
    check, out = script("gpu-check"), tmp_path / "out"
    out.mkdir()
    assert check.keep(out, tmp_path / "results") is None
    content = json.loads(RECORD.read_text())
    content["machine_info"]["gpu"] = "NVIDIA H200"
    content["benchmarks"][0]["stats"]["data"] = [1.0, 2.0]
    (out / "bench.json").write_text(json.dumps(content))
    (out / "registers.log").write_text("table")
    folder = check.keep(out, tmp_path / "results")
    assert folder == tmp_path / "results" / "nvidia-h200"
    assert sorted(path.name for path in folder.iterdir()) == ["bench.json", "registers.log"]
    kept = json.loads((folder / "bench.json").read_text())
    assert "data" not in kept["benchmarks"][0]["stats"]
    assert kept["benchmarks"][0]["extra_info"] == content["benchmarks"][0]["extra_info"]


def test_every_step_names_commands_that_exist(tmp_path: Path):
    check = script("gpu-check")
    for step, commands in check.steps(tmp_path, quick_bench=True).items():
        for command in commands:
            assert command, step
            for part in command[1:]:
                if part.startswith(str(ROOT)):
                    assert Path(part).is_file(), f"{step}: {part}"
    (bench,) = check.steps(tmp_path, quick_bench=True)["bench"]
    assert bench[-2:] == ["-m", "quick"]
    assert check.architecture() == "90" or shutil.which("nvidia-smi") is not None
