"""The command line: what it prints, and one clear line with exit code 2 for bad input."""

import importlib
import pkgutil
import re
from pathlib import Path

import pytest
import torch

import deepshare
from deepshare import cli, models
from deepshare.checkpoint import save_checkpoint
from deepshare.plan import Plan, apply_plan

SPEC = {
    "name": "resnet18",
    "num_classes": 10,
    "width": 2,
    "stem_relu": False,
    "in_channels": 1,
    "input_size": [1, 8, 8],
}


def checkpoint(path: Path, recipe: dict | None = None) -> Path:
    """A fresh ResNet18 of width 2 for digits, every activation a ReLU."""
    torch.manual_seed(0)
    model = models.create("resnet18", num_classes=10, width=2, in_channels=1)
    plan = Plan.of(model, (1, 8, 8))
    save_checkpoint(path, apply_plan(model, plan), SPEC, plan, recipe=recipe)
    return path


@pytest.mark.parametrize(
    ("arguments", "total"),
    [
        (["resnet18", "--input", "3x32x32"], "491,520"),
        (["resnet18", "--input", "3x32x32", "--stem-relu"], "557,056"),
        (["resnet18", "--input", "3x64x64"], "1,966,080"),
        (["resnet34"], "901,120"),
        (["resnet34", "--stem-relu"], "966,656"),
        (["resnet18", "--width", "16", "--input", "1x8x8"], "7,680"),
    ],
)
def test_count_prints_the_total(arguments: list[str], total: str, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["count", *arguments]) == 0
    assert re.search(rf"^total\s+{total}$", capsys.readouterr().out, re.MULTILINE)


def test_count_of_a_plan_and_of_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = checkpoint(tmp_path / "net.safetensors")
    assert cli.main(["count", str(path)]) == 0
    assert re.search(r"^total\s+960$", capsys.readouterr().out, re.MULTILINE)
    plan = Plan.of(models.create("resnet18", num_classes=2), (3, 32, 32)).replace("layer1.0.relu1", "linear")
    plan.save(tmp_path / "plan.json")
    assert cli.main(["count", "resnet18", "--plan", str(tmp_path / "plan.json")]) == 0
    assert re.search(rf"^total\s+{491_520 - 65_536:,}$", capsys.readouterr().out, re.MULTILINE)


def test_count_of_a_checkpoint_takes_no_model_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = str(checkpoint(tmp_path / "net.safetensors"))
    for flags in (["--plan", "absent.json"], ["--input", "3x8x8"], ["--width", "2"], ["--stem-relu"]):
        assert cli.main(["count", path, *flags]) == 2
        assert f"{flags[0]} goes with a model's name" in capsys.readouterr().err


def test_train_lists_the_recipes(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["train", "--list"]) == 0
    assert {"demo-relu", "demo-240", "deepshare-table1-6k"} <= set(capsys.readouterr().out.split())


BAD = {
    "unknown model": (["count", "resnet19"], r"resnet18, resnet34.*'resnet19'"),
    "image size": (["count", "resnet18", "--input", "32"], r"3x32x32.*'32'"),
    "width": (["count", "resnet18", "--width", "0"], r"width must be .*got 0"),
    "absurd width": (["count", "resnet18", "--width", "1000000000000"], r"width must be .*1000000000000"),
    "no plan": (["count", "resnet18", "--plan", "absent.json"], r"absent\.json"),
    "unknown recipe": (["train", "demo-1"], r"demo-1"),
    "no recipe": (["train"], r"RECIPE is missing"),
    "recipe key": (["train", "demo-240", "--set", "model.depth=3"], r"model\.depth"),
    "recipe type": (["train", "demo-240", "--set", "model.width=wide"], r"model\.width.*'wide'"),
    "budget below the floor": (["train", "demo-240", "--set", "plan.budget=10"], r"85.*10|10.*85"),
    "budget above the ReLUs": (["train", "demo-240", "--set", "plan.budget=7681"], r"at most the 7,680 ReLUs.*7,681"),
    "missing data": (["train", "deepshare-table1-6k", "--data-root", "nowhere"], r"nowhere.*train"),
    "no name": (["reproduce"], r"NAME is missing"),
    "no such name": (["reproduce", "deepshare-table1-6"], r"deepshare-table1-6: no such recipe.*deepshare-table1-6k"),
    "no seeds": (["reproduce", "demo-relu", "--seeds", "0"], r"--seeds must be 1 to 1000.*0"),
    "seeds that are none": (["reproduce", "demo-relu", "--seed", "0,a"], r"--seed must be ints.*'0,a'"),
    "no jobs": (["reproduce", "demo-relu", "--jobs", "0"], r"jobs: wanted 1 to 1024, got 0"),
    "nothing to measure": (["criticality", "demo-relu"], r"phase: wanted pretrain and a baseline"),
    "no seed": (["criticality", "demo-criticality", "--seeds", "a"], r"--seeds must be ints.*'a'"),
    "no teacher": (["criticality", "demo-criticality", "--teacher", "absent.safetensors"], r"absent\.safetensors"),
    "no folder for the report": (["secure", "run", "a.safetensors", "--json", "nowhere/x.json"], r"nowhere/x\.json"),
    "no checkpoint": (["secure", "run", "absent.safetensors"], r"absent\.safetensors"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_clear_line_and_writes_nothing(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert re.match("deepshare: .", printed.err)
    assert re.search(message, printed.err, re.DOTALL)
    assert "Traceback" not in printed.err
    assert list(tmp_path.iterdir()) == []


def test_32_bit_gates_take_ranges_that_were_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("deepshare.secure.net.guard.forbid_dealer", lambda: None)  # other tests need it in this process
    path, ranges = checkpoint(tmp_path / "net.safetensors"), tmp_path / "ranges.json"
    described = [
        "secure",
        "serve",
        "--model",
        str(path),
        "--gate-bits",
        "32",
        "--describe",
        str(tmp_path / "net.protocol"),
    ]
    assert cli.main(described) == 2
    assert "--ranges is needed" in capsys.readouterr().err
    measure = ["secure", "calibrate", str(path), "--data", "digits", "--images", "4", "--out", str(ranges)]
    assert cli.main(measure) == 0
    assert "4 images: gates of 32 bits; nearest to the bound is" in capsys.readouterr().out
    assert cli.main([*described, "--ranges", str(ranges)]) == 0
    assert "no weight is in it" in capsys.readouterr().out


def test_secure_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = checkpoint(tmp_path / "net.safetensors")
    assert cli.main(["secure", "run", str(path)]) == 2
    assert "--data is needed" in capsys.readouterr().err
    assert cli.main(["secure", "run", str(path), "--data", "digits", "--images", "0"]) == 2
    assert "--images must be at least 1 (got 0)" in capsys.readouterr().err
    assert cli.main(["secure", "run", str(checkpoint(path, recipe={"data": 3}))]) == 2
    assert "--data is needed" in capsys.readouterr().err
    path.write_bytes(path.read_bytes()[:2000])
    assert cli.main(["secure", "run", str(path)]) == 2
    assert "net.safetensors" in capsys.readouterr().err


def test_every_error_of_the_package_is_bad_input_to_the_command():
    known = cli._bad_input()
    names = [module.name for module in pkgutil.walk_packages(deepshare.__path__, "deepshare.")]
    for name in [name for name in names if name not in ("deepshare.__main__", "deepshare._C")]:
        if name.startswith(("deepshare.kernels", "deepshare.secure.crypten")):
            continue  # what needs Triton or CrypTen
        for value in vars(importlib.import_module(name)).values():
            if isinstance(value, type) and value.__name__.endswith("Error") and value.__module__ == name:
                assert issubclass(value, known) or value.__name__.startswith("_"), f"{name}.{value.__name__}"


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(models, "count_table", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["count", "resnet18"])


def test_a_command_of_one_process_is_refused_under_torchrun(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["count", "resnet18"]) == 2
    assert "count is one process; torchrun starts several of train" in capsys.readouterr().err
