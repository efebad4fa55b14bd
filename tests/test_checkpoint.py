"""Checkpoints: what goes in comes out, and every damage has its name."""

import json
import struct
from pathlib import Path

import pytest
import safetensors.torch
import torch

from deepshare import models
from deepshare.budget import allocate
from deepshare.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from deepshare.nn import SharedReLU2d
from deepshare.plan import Plan, Site, apply_plan

SPEC = {
    "name": "resnet18",
    "num_classes": 5,
    "width": 4,
    "stem_relu": False,
    "in_channels": 1,
    "input_size": [1, 8, 8],
}
IMAGES = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def network(seed: int = 0):
    """(model, plan): layer sharing, trained-looking alphas and statistics, one site still soft."""
    torch.manual_seed(seed)
    plain = models.create("resnet18", num_classes=5, width=4, in_channels=1)
    plan = allocate(Plan.of(plain, (1, 8, 8)), "uniform", 150).plan
    model = apply_plan(plain, plan)
    model(torch.randn(8, 1, 8, 8))
    for module in model.modules():
        if isinstance(module, SharedReLU2d):
            torch.nn.init.normal_(module.alpha)
    model.get_submodule("layer1.0.relu2").soft_channels = 2
    return model.eval(), plan


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    model, plan = network()
    path = tmp_path_factory.mktemp("checkpoint") / "net.safetensors"
    return save_checkpoint(path, model, SPEC, plan, recipe={"name": "demo", "seed": 3}, metrics={"accuracy": 0.5})


def test_everything_comes_back(saved):
    model, plan = network()
    random_state = torch.random.get_rng_state()
    loaded = load_checkpoint(saved)
    assert torch.equal(torch.random.get_rng_state(), random_state)
    assert loaded.plan == plan == Plan.of(loaded.model, (1, 8, 8))
    assert (loaded.spec, loaded.recipe, loaded.metrics) == (SPEC, {"name": "demo", "seed": 3}, {"accuracy": 0.5})
    assert not any(module.training for module in loaded.model.modules())
    assert loaded.model.get_submodule("layer1.0.relu2").soft_channels == 2
    assert torch.equal(loaded.model(IMAGES), model(IMAGES))


@pytest.mark.parametrize("kind", ["relu", "gelu", "linear"])
def test_plain_networks_and_tuples_of_sizes(tmp_path, kind):
    plain = models.create("resnet18", num_classes=5, width=4, in_channels=1)
    plan = Plan.of(plain, (1, 8, 8)).replace_all(kind)
    model = apply_plan(plain, plan).eval()
    loaded = load_checkpoint(save_checkpoint(tmp_path / "x", model, {**SPEC, "input_size": (1, 8, 8)}, plan))
    assert loaded.plan == plan
    assert (loaded.recipe, loaded.metrics) == (None, None)
    assert torch.equal(loaded.model(IMAGES), model(IMAGES))


def test_a_masked_network(tmp_path):
    plain = models.create("resnet18", num_classes=5, width=4, in_channels=1)
    plan = Plan.of(plain, (1, 8, 8)).replace("layer1.0.relu1", "mask", mask=torch.rand(4, 8, 8) < 0.5)
    model = apply_plan(plain, plan).eval()
    assert torch.equal(load_checkpoint(save_checkpoint(tmp_path / "x", model, SPEC, plan)).model(IMAGES), model(IMAGES))


def test_precision_is_kept(tmp_path):
    model, plan = network()
    loaded = load_checkpoint(save_checkpoint(tmp_path / "x", model.double(), SPEC, plan)).model
    assert loaded.fc.weight.dtype == torch.float64
    assert torch.equal(loaded(IMAGES.double()), model(IMAGES.double()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"spec": {**SPEC, "depth": 3}}, "spec must have name"),
        ({"spec": {k: v for k, v in SPEC.items() if k != "stem_relu"}}, "spec must have name"),
        ({"spec": {**SPEC, "width": "4"}}, "spec width must be int .got '4'"),
        ({"spec": {**SPEC, "stem_relu": 0}}, "spec stem_relu must be bool"),
        ({"spec": {**SPEC, "input_size": [1, 9, 9]}}, r"plan is for \[1, 8, 8\], the spec for \[1, 9, 9\]"),
        ({"recipe": {"lr": torch.ones(1)}}, "recipe must be JSON"),
        ({"metrics": {"path": Path("x")}}, "metrics must be JSON"),
    ],
)
def test_what_cannot_be_saved_writes_nothing(tmp_path, changes, message):
    model, plan = network()
    arguments = {"spec": SPEC, "plan": plan, **changes}
    path = tmp_path / "net.safetensors"
    path.write_bytes(b"before")
    with pytest.raises(CheckpointError, match=f"net.safetensors: .*{message}"):
        save_checkpoint(path, model, **arguments)
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"before"]


def test_a_plan_that_is_not_the_models_is_not_saved(tmp_path):
    model, plan = network()
    with pytest.raises(CheckpointError, match=r"the plan says Site\(name='layer1.1.relu2'.*'linear'.* the model has"):
        save_checkpoint(tmp_path / "x", model, SPEC, plan.replace("layer1.1.relu2", "linear"))
    with pytest.raises(CheckpointError, match="is missing in the plan"):
        save_checkpoint(tmp_path / "x", model, SPEC, Plan(plan.sites[:-1], plan.input_size))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("keep", [0, 4, 100, -1, -100])
def test_a_truncated_file_is_refused(saved, tmp_path, keep):
    path = tmp_path / "cut.safetensors"
    path.write_bytes(saved.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"cut\.safetensors: not a readable .safetensors file"):
        load_checkpoint(path)


def test_no_file_garbage_and_strangers_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="none: no such file"):
        load_checkpoint(tmp_path / "none")
    (tmp_path / "garbage").write_bytes(bytes(range(256)) * 20)
    with pytest.raises(CheckpointError, match="garbage: not a readable"):
        load_checkpoint(tmp_path / "garbage")
    with pytest.raises(CheckpointError, match="not a readable"):
        load_checkpoint(tmp_path)
    safetensors.torch.save_file({"w": torch.ones(2)}, tmp_path / "other")
    with pytest.raises(CheckpointError, match="no deepshare checkpoint"):
        load_checkpoint(tmp_path / "other")


def damaged(saved: Path, tmp_path: Path, *, header=None, tensors=None) -> Path:
    """The saved file with header entries replaced (None drops one) and tensors changed."""
    with safetensors.safe_open(saved, "pt") as file:
        old = dict(file.metadata())
    new = {key: value for key, value in {**old, **(header or {})}.items() if value is not None}
    weights = safetensors.torch.load_file(saved)
    path = tmp_path / "bad.safetensors"
    safetensors.torch.save_file((tensors or (lambda same: same))(weights), path, new)
    return path


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"version": "2"}, "checkpoint version must be 1 .got '2'"),
        ({"version": None}, "checkpoint version must be 1 .got None"),
        ({"spec": None}, "header's spec is missing"),
        ({"spec": "{"}, "header's spec is missing or not JSON"),
        ({"spec": "[1]"}, "spec must have name"),
        ({"spec": json.dumps({**SPEC, "name": "vgg"})}, "name must be one of resnet6, .* .got 'vgg'"),
        ({"spec": json.dumps({**SPEC, "blocks": [1, 1]})}, r"blocks must be 4 ints .got \[1, 1\]"),
        ({"spec": json.dumps({**SPEC, "blocks": [2, 2, 2, 3]})}, "tensor 'layer4.2.conv1.weight' is missing"),
        ({"spec": json.dumps({**SPEC, "multipliers": 2})}, "spec multipliers must be list .got 2"),
        ({"spec": json.dumps({**SPEC, "multipliers": [2, 2, 3]})}, r"must have shape \[48, 16, 3, 3\]"),
        ({"spec": json.dumps({**SPEC, "rho": 0.3})}, "rho must be 1 or 0.5 .got 0.3"),
        ({"spec": json.dumps({**SPEC, "rho": "1"})}, "spec rho must be float .got '1'"),
        ({"spec": json.dumps({**SPEC, "width": 8})}, r"tensor 'conv1.weight' must have shape \[8, 1, 3, 3\]"),
        ({"spec": json.dumps({**SPEC, "width": 4096})}, r"tensor 'conv1.weight' must have shape \[4096, 1, 3, 3\]"),
        ({"spec": json.dumps({**SPEC, "width": 10**12})}, r"width must be an int in 1\.\.4096"),
        ({"spec": json.dumps({**SPEC, "num_classes": 10**12})}, r"num_classes must be an int in 1\.\."),
        ({"spec": json.dumps({**SPEC, "input_size": [1, 9, 9]})}, r"plan is for \[1, 8, 8\], the spec for \[1, 9, 9\]"),
        ({"spec": "[" * 200_000}, "header's spec is missing or not JSON"),
        ({"plan": Plan((Site("layer1.0.relu1", (8, 8, 8)),), (1, 8, 8)).to_json()}, "the plan says shape"),
        ({"plan": "[" * 200_000}, "Plan: not JSON"),
        ({"spec": json.dumps({**SPEC, "stem_relu": True})}, "where the model calls 'stem_relu'"),
        ({"spec": json.dumps({**SPEC, "num_classes": 6})}, r"tensor 'fc.weight' must have shape \[6, 32\]"),
        ({"plan": None}, "Plan: not JSON"),
        ({"plan": '{"version": 9}'}, "Plan: version must be 1"),
        ({"recipe": None}, "header's recipe is missing"),
        ({"metrics": "{"}, "header's metrics is missing or not JSON"),
        ({"recipe": "[1]"}, r"header's recipe must be an object or null .got \[1\]"),
        ({"metrics": "0.5"}, "header's metrics must be an object or null .got 0.5"),
    ],
)
def test_a_damaged_header_is_refused(saved, tmp_path, header, message):
    with pytest.raises(CheckpointError, match=rf"bad\.safetensors: .*{message}"):
        load_checkpoint(damaged(saved, tmp_path, header=header))


def _without(name: str):
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without("layer2.0.relu1.alpha"), "tensor 'layer2.0.relu1.alpha' is missing"),
        (lambda tensors: {**tensors, "extra": torch.ones(1)}, "tensor 'extra' belongs to no part"),
        (lambda tensors: {**tensors, "fc.bias": torch.ones(4)}, r"tensor 'fc.bias' must have shape \[5\] .got \[4\]"),
        (
            lambda tensors: {**tensors, "layer1.0.relu1.channel_map.pi": torch.full((4,), 9, dtype=torch.int32)},
            "pi must have values in 0",
        ),
    ],
)
def test_damaged_tensors_are_refused(saved, tmp_path, change, message):
    with pytest.raises(CheckpointError, match=rf"bad\.safetensors: .*{message}"):
        load_checkpoint(damaged(saved, tmp_path, tensors=change))


def test_a_header_that_lies_about_its_length_is_refused(saved, tmp_path):
    content = saved.read_bytes()
    path = tmp_path / "lie.safetensors"
    path.write_bytes(struct.pack("<Q", 2**40) + content[8:])
    with pytest.raises(CheckpointError, match="not a readable"):
        load_checkpoint(path)


def test_a_failed_write_leaves_the_old_file(saved, tmp_path, monkeypatch):
    model, plan = network()
    path = tmp_path / "net.safetensors"
    path.write_bytes(b"before")
    monkeypatch.setattr("os.replace", lambda *names: (_ for _ in ()).throw(OSError("disk gone")))
    with pytest.raises(OSError, match="disk gone"):
        save_checkpoint(path, model, SPEC, plan)
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"before"]
