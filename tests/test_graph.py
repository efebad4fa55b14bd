"""apply_plan: the right activation at every site, edges from leaders to followers, everything else untouched."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from plan_models import (
    SIZE,
    Extras,
    Functional,
    InPlace,
    LeaderChangedInPlace,
    LeaderReadInPlace,
    OwnReLU,
    Reused,
    ShortcutOfOverwritten,
    Untraceable,
    all_shared_in_full,
    chain,
    image,
    led_by_first,
    randomise,
)
from torch import fx, nn

from deepshare import models
from deepshare.budget import allocate
from deepshare.nn import MaskedReLU2d, SharedReLU2d
from deepshare.ops import shared_relu
from deepshare.plan import Plan, PlanError, apply_plan


def test_each_kind_is_put_in_and_read_back():
    model = chain(depth=5)
    mask = torch.rand(8, 6, 6) < 0.5
    plan = Plan.of(model, SIZE).replace("1", "shared", prototypes=3).replace("3", "linear").replace("5", "gelu")
    plan = plan.replace("7", "mask", mask=mask)
    result = apply_plan(model, plan)
    assert Plan.of(result, SIZE) == plan
    assert type(result) is nn.Sequential
    assert [type(result[i]) for i in (1, 3, 5, 7, 9)] == [SharedReLU2d, nn.Identity, nn.GELU, MaskedReLU2d, nn.ReLU]
    assert Plan.of(model, SIZE).drelus == 5 * 8 * 36, "the model given must stay as it was"
    x = image()
    hidden = model[2](shared_relu(model[0](x), result[1].channel_map, torch.ones(8), torch.zeros(8)))
    hidden = model[6](F.gelu(model[4](hidden)))
    expected = F.relu(model[8](torch.where(mask, hidden.relu(), hidden)))
    torch.testing.assert_close(result(x), expected)


def test_followers_take_their_leaders_gates():
    model = chain(depth=3)
    result = randomise(apply_plan(model, led_by_first(Plan.of(model, SIZE), 3)))
    x = image()
    first, acts = model[0](x), [result.get_submodule(name) for name in ("1", "3", "5")]
    hidden = first
    for i, act in enumerate(acts):
        hidden = hidden if i == 0 else model[2 * i](hidden)
        hidden = shared_relu(hidden, acts[0].channel_map, act.alpha, act.beta, source=first)
    torch.testing.assert_close(result(x), hidden)


def test_soft_gates_send_gradient_through_the_edge():
    result = apply_plan(chain(depth=2), led_by_first(Plan.of(chain(depth=2), SIZE), 2))
    follower = result.get_submodule("3")
    for soft, expected in ((0, False), (8, True)):
        follower.soft_channels = soft
        result.get_submodule("1").alpha.data.zero_()  # the edge is the only way back to the first convolution
        gradient = torch.autograd.grad(result(image()).sum(), result.get_submodule("0").weight)[0]
        assert bool(gradient.any()) is expected


@pytest.mark.parametrize("make", [Functional, InPlace, ShortcutOfOverwritten, Reused, Extras])
def test_full_sharing_leaves_the_function_unchanged(make):
    """P = C is ReLU: any edge, alias or in-place habit treated wrongly shows in the output."""
    size = (4, 6, 6) if make is Functional else SIZE
    model = make().eval()
    plan = all_shared_in_full(Plan.of(model, size))
    result = apply_plan(model, plan)
    assert Plan.of(result, size) == plan
    torch.testing.assert_close(result(image(size)), model(image(size)))
    assert sum(isinstance(module, SharedReLU2d) for module in result.modules()) >= len(plan)


@pytest.mark.parametrize("make", [Functional, Reused])
def test_every_call_gets_a_module_of_its_own(make):
    size = (4, 6, 6) if make is Functional else SIZE
    plan = Plan.of(make(), size)
    for position, site in enumerate(plan.sites):
        plan = plan.replace(site.name, "shared", prototypes=1 + position % 4)
    result = apply_plan(make(), plan)
    for site in plan:
        assert result.get_submodule(site.name).prototypes == site.prototypes


def test_one_call_of_a_reused_module_can_change_alone():
    model = Reused()
    result = apply_plan(model, Plan.of(model, SIZE).replace("relu@2", "linear"))
    x = image()
    expected = model.convs[2](model.convs[1](model.convs[0](x).relu())).relu()
    torch.testing.assert_close(result(x), expected)


def test_layer_sharing_over_functional_relus():
    model = Functional().eval()
    result = randomise(apply_plan(model, led_by_first(Plan.of(model, (4, 6, 6)), 3)))
    x = image((4, 6, 6))
    source, channel_map = model.block.conv(x), result.get_submodule("block:relu").channel_map

    def act(name: str, y: torch.Tensor) -> torch.Tensor:
        module = result.get_submodule(name)
        return shared_relu(y, channel_map, module.alpha, module.beta, source=source)

    hidden = act("block:relu@3", act("block:relu@2", act("block:relu", source) + 1) - 1)
    hidden = act("block:relu@5", act("block:relu@4", model.block.conv(hidden)) + 1)
    hidden = act(":relu", act("block:relu@6", hidden - 1) - 0.1)
    torch.testing.assert_close(result(x), model.fc(hidden.mean((2, 3))).relu())
    assert count_followers(result) == 6


def count_followers(model: fx.GraphModule) -> int:
    return sum("source" in node.kwargs for node in model.graph.nodes)


def test_all_other_weights_keep_their_names():
    model = Extras()
    result = apply_plan(model, led_by_first(Plan.of(model, SIZE), 2))
    report = result.load_state_dict(model.state_dict(), strict=False)
    assert report.unexpected_keys == []
    assert {key.split(".")[0] for key in report.missing_keys} == {"act1", "act2"}
    assert [key for key in result.state_dict() if not key.startswith("act")] == list(model.state_dict())
    assert dict(result.named_buffers()).keys() >= {"conv1.seen"}


def test_weights_are_copies():
    model = Extras()
    result = apply_plan(model, led_by_first(Plan.of(model, SIZE), 2))
    ours = {p.untyped_storage().data_ptr() for p in (*result.parameters(), *result.buffers())}
    assert not ours & {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}


def test_trained_activations_stay_where_the_plan_stays():
    model = chain(depth=4)
    plan = led_by_first(Plan.of(model, SIZE), 2)
    trained = randomise(apply_plan(model, plan))
    again = apply_plan(trained, plan)
    torch.testing.assert_close(again(image()), trained(image()), rtol=0, atol=0)
    changed = apply_plan(trained, plan.replace("7", "relu"))
    assert torch.equal(changed.get_submodule("3").alpha, trained.get_submodule("3").alpha)
    assert type(changed.get_submodule("7")) is nn.ReLU
    fewer = apply_plan(trained, plan.replace("1", "shared", prototypes=1))
    assert {module.prototypes for module in fewer.modules() if isinstance(module, SharedReLU2d)} == {1}
    undone = apply_plan(trained, plan.replace_all("relu"))
    torch.testing.assert_close(undone(image()), model(image()))


def _plain() -> tuple[nn.Module, torch.Tensor]:
    model = Extras()
    plan = Plan.of(model, SIZE).replace("act1", "shared", prototypes=2)
    return randomise(apply_plan(model, plan)).eval(), image()


def _edges() -> tuple[nn.Module, torch.Tensor]:
    model = Extras()
    return randomise(apply_plan(model, led_by_first(Plan.of(model, SIZE), 2))).eval(), image()


@pytest.mark.parametrize("make", [_plain, _edges])
def test_the_result_survives_deepcopy_and_pickle(make):
    model, x = make()
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(model), copy.deepcopy(copy.deepcopy(model)), torch.load(buffer, weights_only=False)):
        assert torch.equal(twin(x), model(x))
        assert list(twin.state_dict()) == list(model.state_dict())
        assert not any(a is b for a, b in zip(twin.parameters(), model.parameters(), strict=True))
        assert Plan.of(twin, SIZE) == Plan.of(model, SIZE)


@pytest.mark.parametrize("make", [_plain, _edges])
def test_the_result_follows_modes_and_dtypes(make):
    model, x = make()
    assert not any(module.training for module in model.modules())
    assert all(module.training for module in model.train().modules())
    before = model.bn.running_mean.clone()
    model(x)
    assert not torch.equal(model.bn.running_mean, before)
    expected = model.eval()(x)
    torch.testing.assert_close(model.to(torch.float64)(x.double()).float(), expected)


def test_a_model_in_eval_mode_stays_there():
    model = Extras().eval()
    result = apply_plan(model, led_by_first(Plan.of(model, SIZE), 2))
    assert not any(module.training for module in result.modules())


def test_edges_compile_and_export():
    """Site names such as ':relu@2' are no Python identifiers: they must pass too."""
    model = randomise(apply_plan(Functional(), led_by_first(Plan.of(Functional(), (4, 6, 6)), 2)))
    x = image((4, 6, 6))
    torch.testing.assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(x), model(x))
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), model(x))


def test_an_untraceable_model_gets_what_module_swaps_can_give():
    model = Untraceable()
    plan = Plan.of(model, SIZE).replace("once", "shared", prototypes=1)
    plan = plan.replace("twice", "linear").replace("twice@2", "linear")
    result = apply_plan(model, plan)
    assert Plan.of(result, SIZE) == plan
    assert isinstance(result, Untraceable)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([("once", {"prototypes": 2}), ("twice", {"leader": "once"})], "site 'twice' takes or loses the gates"),
        ([(":relu", {"prototypes": 2})], "site ':relu' is a function call"),
        ([("twice@2", {"prototypes": 2})], "site 'twice@2' is one of 2 calls of the module 'twice'"),
    ],
)
def test_an_untraceable_model_refuses_the_rest(changes, message):
    plan = Plan.of(Untraceable(), SIZE)
    for name, fields in changes:
        plan = plan.replace(name, "shared", **fields)
    with pytest.raises(PlanError, match=f"{message}.*Untraceable cannot be traced: TraceError: symbolically traced"):
        apply_plan(Untraceable(), plan)


def test_a_subclass_with_a_forward_of_its_own_is_what_it_calls():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), OwnReLU()).eval()
    plan = Plan.of(model, SIZE)
    assert [site.name for site in plan] == ["1:relu", "1:relu@2"]
    torch.testing.assert_close(apply_plan(model, all_shared_in_full(plan))(image()), model(image()))


def test_a_plan_is_put_into_a_model_without_values():
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
    plan = led_by_first(Plan.of(model, SIZE), 2)
    result = apply_plan(model, plan)
    assert Plan.of(result, SIZE) == plan
    assert all(parameter.is_meta for parameter in result.parameters())


@pytest.mark.filterwarnings("ignore:.*weight_norm")
def test_a_model_that_cannot_be_copied_says_so():
    model = nn.Sequential(torch.nn.utils.weight_norm(nn.Conv2d(3, 4, 3)), nn.ReLU())
    model(image())
    with pytest.raises(PlanError, match=r"Sequential cannot be copied: .*deepcopy"):
        Plan.of(model, SIZE)


@pytest.mark.parametrize(("make", "name"), [(InPlace, "act"), (ShortcutOfOverwritten, "act1")])
def test_an_in_place_relu_leaves_its_result_to_later_readers(make, name):
    model = make().eval()
    result = apply_plan(model, Plan.of(model, SIZE).replace(name, "shared", prototypes=3 if name == "act1" else 4))
    torch.testing.assert_close(result(image()), model(image()))
    assert isinstance(result, fx.GraphModule)


def test_in_place_relus_that_nobody_misses_are_just_swapped():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True))
    assert type(apply_plan(model, Plan.of(model, SIZE).replace("1", "shared", prototypes=1))) is nn.Sequential


@pytest.mark.parametrize("calls", [1, 2])
def test_a_kept_in_place_relu_does_not_overwrite_a_source(calls):
    model = LeaderReadInPlace().eval()
    if calls == 2:
        model.act2 = model.overwriting
    plan = Plan.of(model, SIZE)
    follower = plan.sites[2].name
    plan = plan.replace("act1", "shared", prototypes=4).replace(follower, "shared", leader="act1")
    x = model.conv(image())
    y = x.relu() - 0.2
    torch.testing.assert_close(apply_plan(model, plan)(image()), y * (x >= 0))


def test_a_preactivation_changed_in_place_cannot_lead():
    plan = Plan.of(LeaderChangedInPlace(), SIZE)
    with pytest.raises(
        PlanError, match=r"'act2' needs the pre-activation of 'act1', which is changed in place before.*mul_"
    ):
        apply_plan(LeaderChangedInPlace(), led_by_first(plan, 1))
    model = LeaderChangedInPlace()
    result = apply_plan(model, all_shared_in_full(plan))
    torch.testing.assert_close(result(image()), model(image()))


def test_activations_behind_linear_layers_are_shared():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU())
    plan = led_by_first(Plan.of(model, (3, 2, 2)), 2)
    assert plan.drelus == 2
    result, x = randomise(apply_plan(model, plan)), image((3, 2, 2))
    gates = (model[1](x.flatten(1)) >= 0)[:, [0, 1, 0, 1, 0, 1]]
    first, second = result.get_submodule("2"), result.get_submodule("4")
    hidden = model[1](x.flatten(1)) * (first.alpha * gates + first.beta)
    expected = model[3](hidden) * (second.alpha * gates + second.beta)
    torch.testing.assert_close(result(x), expected)


@pytest.mark.parametrize(
    ("other", "size", "message"),
    [
        (chain(depth=2), SIZE, "site '5' is missing in the model"),
        (chain(depth=4), SIZE, "site '7' is missing in the plan"),
        (chain(channels=9), SIZE, r"site '1': the plan says shape \(8, 6, 6\), the model has \(9, 6, 6\)"),
        (nn.Sequential(nn.Identity(), *chain()), SIZE, "the plan has site '1' where the model calls '2'"),
        (chain(), (4, 6, 6), "does not run on a batch"),
    ],
)
def test_a_plan_for_another_model_is_refused(other, size, message):
    plan = Plan(Plan.of(chain(), SIZE).sites, size)
    with pytest.raises(PlanError, match=message):
        apply_plan(other, plan)


def test_an_activation_hidden_from_the_module_tree_is_refused():
    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = nn.ReLU()
            self.steps = [self.act]

        def forward(self, x):
            return self.steps[0](x)

    with pytest.raises(PlanError, match="site 'act': Hidden does not call the module registered there"):
        apply_plan(Hidden(), Plan.of(Hidden(), SIZE).replace("act", "shared", prototypes=1))


def test_a_whole_resnet_is_rewired():
    model = models.create("resnet18", num_classes=3, width=8, in_channels=1).eval()
    plan = allocate(Plan.of(model, (1, 8, 8)), "uniform", 300).plan
    result = apply_plan(model, plan)
    assert Plan.of(result, (1, 8, 8)) == plan
    assert count_followers(result) == len(plan) - 4
    assert type(result.layer1[0]) is models.BasicBlock
    assert result(image((1, 8, 8))).shape == (2, 3)
