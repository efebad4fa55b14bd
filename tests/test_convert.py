"""convert: models this project never saw, from before to after training, and what it refuses."""

import copy
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from foreign_models import (
    CLASSES,
    FOREIGN,
    SIZE,
    Branches,
    ControlFlow,
    ControlFlowOverFunctions,
    Mixer,
    Mobile,
    OneReLU,
    Plain,
    Residual,
    Smooth,
    Tokens,
)
from torch import Tensor, fx, nn

from deepshare import convert
from deepshare.budget import BudgetError, weights_of
from deepshare.nn import MaskedReLU2d, SharedReLU2d
from deepshare.plan import Plan, PlanError, apply_plan, count_drelus

pytestmark = pytest.mark.filterwarnings("ignore:convert. Sigmoid stay")
foreign = pytest.mark.parametrize("make", FOREIGN)


def images(batch: int = 16, seed: int = 0) -> Tensor:
    return torch.randn(batch, *SIZE, generator=torch.Generator().manual_seed(seed))


def built(make: type[nn.Module], seed: int = 0) -> nn.Module:
    """As after some training: batch norms away from where they start."""
    torch.manual_seed(seed)
    model = make()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.3, 1.0)
            nn.init.normal_(module.bias, std=0.3)
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model


def seeded(model: nn.Module) -> Tensor:
    """Its output with the same dropout every time."""
    torch.manual_seed(3)
    return model(images())


def followers(plan: Plan) -> int:
    return sum(site.leader is not None for site in plan)


def test_the_six_models_call_what_they_say():
    kinds = {make: [site.kind for site in Plan.of(built(make), SIZE)] for make in FOREIGN}
    assert {make.__name__: (len(found), set(found)) for make, found in kinds.items()} == {
        "Plain": (4, {"relu"}),
        "OneReLU": (4, {"relu"}),
        "Residual": (10, {"relu"}),
        "Dense": (7, {"relu"}),
        "Mobile": (7, {"relu6"}),
        "Branches": (5, {"relu"}),
    }


@foreign
@pytest.mark.parametrize("training", [False, True])
def test_all_gates_leave_the_function_as_it_was(make, training):
    """P = C: bit for bit in value (a ReLU6 away from its clip), and in every weight's gradient."""
    model = built(make).train(training)
    result = convert(model, SIZE, Plan.of(model, SIZE).drelus)
    assert all(site.prototypes == site.channels for site in Plan.of(result, SIZE))
    before, after = seeded(model), seeded(result)
    assert torch.equal(after, before)
    assert not torch.equal(before, torch.zeros_like(before))
    after.square().sum().backward()
    before.square().sum().backward()
    for name, weight in model.named_parameters():
        torch.testing.assert_close(result.get_parameter(name).grad, weight.grad)


@foreign
def test_a_model_is_converted_trained_saved_loaded_and_counted(make, tmp_path: Path):
    model = built(make)
    before = copy.deepcopy(model.state_dict())
    budget = Plan.of(model, SIZE).drelus // 4
    result = convert(model, SIZE, budget)
    plan = Plan.of(result, SIZE)
    assert 0.9 * budget < count_drelus(result, SIZE).total == plan.drelus <= budget
    assert followers(plan) > 0
    assert all(torch.equal(result.state_dict()[name], value) for name, value in before.items())

    losses = train(result, steps=12)
    assert losses[-1] < losses[0]
    assert Plan.of(result, SIZE) == plan
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()), (
        "the model given changed"
    )

    plan.save(tmp_path / "plan.json")
    torch.save(result.state_dict(), tmp_path / "weights.pt")
    loaded = apply_plan(built(make, seed=7), Plan.load(tmp_path / "plan.json"))
    loaded.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    assert torch.equal(loaded.eval()(images()), result.eval()(images()))
    assert count_drelus(loaded, SIZE).total == plan.drelus


def train(model: nn.Module, steps: int) -> list[float]:
    """Losses of SGD on one batch: a third of the steps with soft gates, a third half switched, the rest hard."""
    labels = torch.arange(16) % CLASSES
    gates = [module for module in model.modules() if isinstance(module, SharedReLU2d)]
    optimiser = torch.optim.SGD(model.train().parameters(), lr=0.05, momentum=0.9)
    losses = []
    for step in range(steps):
        for gate in gates:
            gate.soft_channels = gate.channels * max(0, 2 - 3 * step // steps) // 2
        loss = F.cross_entropy(model(images()), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert not any(gate.soft_channels for gate in gates)
    assert any(not torch.equal(gate.alpha, torch.ones_like(gate.alpha)) for gate in gates)
    return losses


def test_gates_go_from_layer_to_layer_where_shapes_are_equal():
    plan = Plan.of(convert(built(OneReLU), SIZE, 432), SIZE)
    assert [site.leader for site in plan] == [None, "relu", None, "relu@3"]
    assert followers(Plan.of(convert(built(OneReLU), SIZE, 432, layer_sharing=False), SIZE)) == 0
    assert followers(Plan.of(convert(built(OneReLU), SIZE, 432, group=1), SIZE)) == 0


def test_branches_of_one_shape_share_gates_too():
    """Neighbours in call order, not in depth: the paper's groups are consecutive layers, which a graph has not."""
    plan = Plan.of(convert(built(Branches), SIZE, 600), SIZE)
    assert [site.leader for site in plan] == [None, "one:relu", None, None, None]


def test_the_clip_of_a_relu6_goes(monkeypatch):
    model = built(Mobile).eval()
    large = 40 * images()
    result = convert(model, SIZE, Plan.of(model, SIZE).drelus)
    clipped = model(large)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU6):
                setattr(module, name, nn.ReLU())
    monkeypatch.setattr(F, "relu6", F.relu)
    assert torch.equal(result(large), model(large))
    assert not torch.allclose(result(large), clipped)


def test_weights_say_where_the_budget_goes():
    model = built(Residual)
    plan = Plan.of(model, SIZE)
    masks = plan
    for site in plan:  # as SNL may leave them: everything in the last block
        kept = torch.full(site.shape, site.name.startswith("blocks.2"))
        masks = masks.replace(site.name, "mask", mask=kept)
    result = Plan.of(convert(model, SIZE, 1_500, weights=weights_of(masks)), SIZE)
    ratios = {s.name: s.prototypes / s.channels for s in result if s.prototypes is not None}
    assert min(ratios["blocks.2.relu"], ratios["blocks.2.relu@3"]) > 0.9
    assert ratios["stem.2"] < 0.5


def test_any_plan_can_be_given():
    """Masks, culled layers and shared gates beside each other, on a model torch.fx must rewrite."""
    model = built(Residual).eval()
    plan = Plan.of(model, SIZE)
    mask = torch.rand(4, 12, 12, generator=torch.Generator().manual_seed(1)) < 0.5
    plan = plan.replace("stem.2", "linear").replace("blocks.0.relu", "mask", mask=mask)
    plan = plan.replace("blocks.2.relu", "shared", prototypes=2)
    result = convert(model, SIZE, plan=plan)
    assert Plan.of(result, SIZE) == plan
    assert {type(result.get_submodule(name)) for name in ("blocks.0.relu",)} == {MaskedReLU2d}
    x = images()
    hidden = model.stem[1](model.stem[0](x))
    block = model.blocks[0]
    first = block.bn1(block.conv1(hidden))
    inner = torch.where(mask, first.relu(), first)
    inner = block.bn2(block.conv2(inner)).relu()
    hidden = (block.bn3(block.conv3(inner)) + hidden).relu()
    torch.testing.assert_close(result.blocks[0].relu(first), torch.where(mask, first.relu(), first))
    seen: list[Tensor] = []
    result.get_submodule("blocks.0.relu@3").register_forward_hook(lambda module, args, output: seen.append(output))
    result(x)
    torch.testing.assert_close(seen[0], hidden)


def test_a_model_torch_fx_cannot_trace_shares_channels_alone():
    model = built(ControlFlow).eval()
    with pytest.warns(UserWarning, match="layers do not: .*ControlFlow cannot be traced: TraceError") as caught:
        result = convert(model, SIZE, 600)
    assert Path(caught[0].filename).name == Path(__file__).name
    assert type(result) is ControlFlow
    plan = Plan.of(result, SIZE)
    assert (plan.drelus, followers(plan)) == (576, 0)
    with pytest.raises(ValueError, match="must be finite"):
        result(images() * float("inf"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        full = convert(model, SIZE, 2_304)  # one leader per layer anyway
        convert(model, SIZE, 600, layer_sharing=False)
    assert torch.equal(full(images()), model(images()))


@pytest.mark.filterwarnings("default")
def test_activations_that_are_no_sites_are_named():
    with pytest.warns(UserWarning, match="convert: Sigmoid stay as they are, and are in no count"):
        result = convert(built(Branches), SIZE, 600)
    assert type(result.gate) is nn.Sigmoid


@pytest.mark.parametrize("settings", [{"layer_sharing": True}, {"group": 2}])
def test_layer_sharing_that_was_asked_for_is_not_left_out(settings):
    with pytest.raises(PlanError, match=r"site 'act2' takes or loses the gates.*ControlFlow cannot be traced"):
        convert(built(ControlFlow), SIZE, 600, **settings)


def test_what_neither_a_trace_nor_a_swap_reaches_is_refused_with_both_reasons():
    message = "no layer sharing .*takes or loses the gates.*without it: .*':relu' is a function call.*cannot be traced"
    with pytest.raises(PlanError, match=message):
        convert(built(ControlFlowOverFunctions), SIZE, 600)


def test_the_floor_without_layer_sharing_is_named():
    with pytest.raises(BudgetError, match=r"no layer sharing .*cannot be traced.*at least 288 DReLUs.*got 200"):
        convert(built(ControlFlow), SIZE, 200)


def test_a_group_length_that_cannot_spend_the_budget_warns():
    with pytest.warns(UserWarning, match=r"groups of up to 2 sites can spend no more than 1,728 of 3,000 DReLUs"):
        result = convert(built(OneReLU), SIZE, 3_000, group=2)
    assert Plan.of(result, SIZE).drelus == 1_728


@pytest.mark.parametrize(
    ("make", "arguments", "error", "message"),
    [
        (Plain, {"budget": 100}, BudgetError, r"at least 181 DReLUs, one prototype per leader .*got 100"),
        (Plain, {"budget": 2_905}, BudgetError, r"budget must be at most the 2,904 ReLUs of the model .got 2,905"),
        (Plain, {"budget": 1000.0}, BudgetError, "budget must be an int"),
        (Plain, {"budget": True}, BudgetError, "budget must be an int"),
        (Plain, {}, ValueError, "either budget or plan .got neither"),
        (Plain, {"budget": 400, "method": "snl"}, ValueError, r'method must be "deepshare" .got .snl.*give the plan'),
        (Plain, {"budget": 400, "weights": [1, 2]}, BudgetError, "weights must be 4 numbers"),
        (Plain, {"budget": 400, "weights": "ResNet18_c100_relu50k"}, BudgetError, "is for a network of"),
        (
            Plain,
            {"budget": 400, "input_size": (1, 12, 12)},
            PlanError,
            r"Plain does not run on a batch \[1, 1, 12, 12\]",
        ),
        (Plain, {"budget": 400, "input_size": (3, 16, 16)}, PlanError, r"does not run on a batch \[1, 3, 16, 16\]"),
        (Plain, {"budget": 400, "input_size": "3x12x12"}, PlanError, "convert: input_size must be positive ints"),
        (Smooth, {"budget": 400}, PlanError, "Smooth calls no ReLU.*it has Hardswish, SiLU: what"),
        (Tokens, {"budget": 400}, PlanError, r"'layer:relu' activates a linear layer over \[N, 36, 16\], whose last"),
        (
            Mixer,
            {"budget": 400},
            PlanError,
            r"site 'layer.1' activates a linear layer over \[N, 12, 12, 8\]",
        ),
        (nn.Flatten, {"budget": 400}, PlanError, "Flatten calls no ReLU.*it has none"),
    ],
)
def test_bad_input_is_refused(make, arguments, error, message):
    with pytest.raises(error, match=message):
        convert(make(), **{"input_size": SIZE, **arguments})


def test_a_plan_must_be_the_models_and_the_images():
    model, plan = built(Plain), Plan.of(built(Plain), SIZE)
    with pytest.raises(ValueError, match=r"either budget or plan \(got both"):
        convert(model, SIZE, 400, plan=plan)
    with pytest.raises(ValueError, match=r"plan must be a Plan \(got str"):
        convert(model, SIZE, plan="plan.json")
    with pytest.raises(ValueError, match=r"model must be an nn\.Module \(got type"):
        convert(Plain, SIZE, 400)
    with pytest.raises(
        PlanError, match=r"convert: the plan is for images of \(3, 12, 12\) .got input_size \(3, 13, 13\)"
    ):
        convert(model, (3, 13, 13), plan=plan)
    with pytest.raises(PlanError, match="the plan has site ':relu' where the model calls 'relu'"):
        convert(built(OneReLU), SIZE, plan=plan)


def test_the_documentation_does_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Every Python block of docs/convert.md, in order."""
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).resolve().parents[1] / "docs" / "convert.md").read_text()
    blocks = [part.split("```", 1)[0] for part in text.split("```python\n")[1:]]
    assert len(blocks) >= 3
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "docs/convert.md", "exec"), names)
    assert isinstance(names["loaded"], fx.GraphModule)
    assert [site.prototypes for site in names["plan"]] == [12, None, None, None]
    assert torch.equal(names["loaded"].eval()(images(4)), names["shared"].eval()(images(4)))
