"""Plan and Site as values: validation, counting, JSON, table."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from plan_models import Functional, Reused, Untraceable, chain
from torch import nn

from deepshare.nn import MaskedReLU2d, SharedReLU2d
from deepshare.plan import Mask, Plan, PlanError, Site, count_drelus, parse_input_size

SHAPE = (4, 3, 2)


def plan_of_all_kinds() -> Plan:
    mask = torch.zeros(SHAPE, dtype=torch.bool)
    mask[0, :, 0] = True
    sites = (
        Site("a", SHAPE, "shared", prototypes=2),
        Site("b", SHAPE, "shared", leader="a"),
        Site("c", SHAPE),
        Site("d", SHAPE, "gelu"),
        Site("e", SHAPE, "linear"),
        Site("f", SHAPE, "mask", mask=mask),
        Site("g", SHAPE, "mask", mask=torch.tensor([True, False, True, True])),
        Site("fc:relu", (10,), "shared", prototypes=3),
    )
    return Plan(sites, (3, 8, 8))


def test_every_kind_is_counted_by_hand():
    count = count_drelus(plan_of_all_kinds())
    assert count.per_site == {"a": 12, "b": 0, "c": 24, "d": 24, "e": 0, "f": 3, "g": 18, "fc:relu": 3}
    assert count.total == plan_of_all_kinds().drelus == 84


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"shape": (4, 0, 2)}, "shape must be a tuple of positive ints"),
        ({"shape": (4, 2.0)}, "shape must be a tuple of positive ints"),
        ({"kind": "tanh"}, "kind must be one of relu, relu6, gelu"),
        ({"kind": "shared"}, "either prototypes or a leader"),
        ({"kind": "shared", "prototypes": 1, "leader": "a"}, "either prototypes or a leader"),
        ({"kind": "shared", "prototypes": 0}, "prototypes must be an int in 1..4"),
        ({"kind": "shared", "prototypes": 5}, "prototypes must be an int in 1..4"),
        ({"kind": "shared", "prototypes": True}, "prototypes must be an int in 1..4"),
        ({"kind": "relu", "prototypes": 2}, "only a shared site has prototypes"),
        ({"kind": "mask"}, "kind 'mask' has a mask"),
        ({"kind": "relu", "mask": torch.ones(SHAPE, dtype=torch.bool)}, "no other kind has one"),
        ({"kind": "mask", "mask": torch.ones(4, 3, dtype=torch.bool)}, r"mask must be \(4, 3, 2\) or \(4,\)"),
        ({"kind": "mask", "mask": torch.ones(SHAPE)}, "bool tensor"),
    ],
)
def test_a_wrong_site_is_refused(fields, message):
    with pytest.raises(PlanError, match=message):
        Site("x", **{"shape": SHAPE, **fields})


@pytest.mark.parametrize(
    ("sites", "message"),
    [
        ([Site("a", SHAPE), Site("a", SHAPE)], "stands twice"),
        ([Site("b", SHAPE, "shared", leader="a"), Site("a", SHAPE, "shared", prototypes=1)], "must be an earlier site"),
        ([Site("a", SHAPE), Site("b", SHAPE, "shared", leader="a")], "must have prototypes"),
        (
            [Site("a", (4, 3, 3), "shared", prototypes=1), Site("b", SHAPE, "shared", leader="a")],
            r"'b': leader 'a' must have shape \(4, 3, 2\)",
        ),
    ],
)
def test_a_wrong_plan_is_refused(sites, message):
    with pytest.raises(PlanError, match=message):
        Plan(tuple(sites), (3, 8, 8))


def test_replace_changes_one_site_and_keeps_the_rest():
    plan = plan_of_all_kinds()
    changed = plan.replace("c", "mask", mask=torch.ones(4, dtype=torch.bool))
    assert changed["c"].drelus == 24
    assert [s for s in changed if s.name != "c"] == [s for s in plan if s.name != "c"]
    assert {s.kind for s in plan.replace_all("gelu")} == {"gelu"}
    with pytest.raises(PlanError, match="no site 'nowhere'; sites are a, b"):
        plan.replace("nowhere", "relu")
    with pytest.raises(PlanError, match="site 'b': leader 'a' must have prototypes"):
        plan.replace("a", "relu")


def test_json_and_files_give_the_plan_back(tmp_path):
    plan = plan_of_all_kinds()
    assert Plan.from_json(plan.to_json()) == plan
    assert Plan.load(plan.save(tmp_path / "plan.json")) == plan
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


@given(st.lists(st.integers(1, 5), min_size=1, max_size=3), st.integers(0, 2**31 - 1))
def test_a_mask_survives_packing(shape, seed):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    packed = Mask.of(mask)
    assert torch.equal(packed.tensor(), mask)
    assert packed.ones == int(mask.sum())


def _edited(**changes) -> str:
    fields = json.loads(plan_of_all_kinds().to_json())
    return json.dumps({**fields, **changes})


def _edited_site(index: int, **changes) -> str:
    sites = json.loads(plan_of_all_kinds().to_json())["sites"]
    sites[index] = {key: value for key, value in {**sites[index], **changes}.items() if value is not ...}
    return _edited(sites=sites)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[" * 200_000, "not JSON"),
        ('{"version": 1, "input_size": [1' + "0" * 5000 + "]}", "not JSON"),
        (_edited(input_size=[3, 10**6, 10**6]), "input_size must be at most 67,108,864 values"),
        (_edited_site(0, shape=[10**12, 3, 2]), "site 'a': shape must have at most"),
        (_edited_site(5, mask={"shape": [4, 3, 2], "bits": "é"}), "site 'f': mask bits are not base64"),
        ("[]", "must be an object"),
        (_edited(version=2), "version must be 1 .got 2"),
        (_edited(budget=1), "fields must be"),
        (_edited(sites={}), "sites must be a list"),
        (_edited(input_size="3x8x8"), "input_size must be a list"),
        (_edited(input_size=[3, "8", 8]), "input_size must be positive ints"),
        (_edited(sites=[3]), "a site must be an object with a name"),
        (_edited_site(0, prototypes=9), "site 'a': prototypes must be an int in 1..4"),
        (_edited_site(0, kind=["shared"]), "site 'a': kind must be one of"),
        (_edited_site(0, colour="red"), "site 'a': unknown field 'colour'"),
        (_edited_site(0, kind=...), "site 'a': missing field 'kind'"),
        (_edited_site(0, shape="4x3x2"), "site 'a': shape must be a list"),
        (_edited_site(0, shape=[4, [3], 2]), "site 'a': shape must be a tuple of positive ints"),
        (_edited_site(1, leader="z"), "site 'b': leader 'z' must be an earlier site"),
        (_edited_site(1, leader=["a"]), "site 'b': leader must be a site's name"),
        (_edited_site(5, mask="AAAA"), "site 'f': mask must be an object"),
        (_edited_site(5, mask={"shape": [4, 3, 2], "bits": "!"}), "site 'f': mask bits are not base64"),
        (_edited_site(5, mask={"shape": [4, 3, 2], "bits": "AAAA" * 2}), "site 'f': mask: Mask: bits must be 3 bytes"),
        (_edited_site(6, mask={"shape": [4], "bits": "AQ=="}), "bits after the last"),
    ],
)
def test_damaged_json_is_refused_by_name(text, message, tmp_path):
    with pytest.raises(PlanError, match=message):
        Plan.from_json(text)
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(PlanError, match=r"p\.json: "):
        Plan.load(tmp_path / "p.json")


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = plan_of_all_kinds().save(tmp_path / "plan.json")
    before = path.read_bytes()
    monkeypatch.setattr("os.replace", lambda *names: (_ for _ in ()).throw(OSError("disk gone")))
    with pytest.raises(OSError, match="disk gone"):
        plan_of_all_kinds().replace_all("linear").save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_the_table_shows_every_site_and_the_total():
    lines = plan_of_all_kinds().table().splitlines()
    assert lines[0].split() == ["site", "kind", "shape", "gates", "DReLUs"]
    rows = {line.split()[0]: line.split()[1:] for line in lines[2:10]}
    assert rows["a"] == ["shared", "4x3x2", "P=2", "12"]
    assert rows["b"] == ["shared", "4x3x2", "of", "a", "0"]
    assert rows["g"] == ["mask", "4x3x2", "18", "of", "24", "18"]
    assert lines[-2].split() == ["total", "84"]
    assert "3x8x8" in lines[-1]


def test_functional_relus_are_named_by_their_caller():
    plan = Plan.of(Functional(), (4, 5, 5))
    first = [f"block:relu{call}" for call in ("", "@2", "@3", "@4", "@5", "@6")]
    assert [site.name for site in plan] == [*first, ":relu", ":relu@2"]
    assert [site.shape for site in plan] == [(4, 5, 5)] * 7 + [(6,)]


def test_calls_are_counted_not_modules():
    plan = Plan.of(Reused(), (3, 4, 4))
    assert [site.name for site in plan] == ["relu", "relu@2", "relu@3"]
    assert plan.drelus == 3 * 6 * 16


def test_an_untraceable_model_is_counted():
    count = count_drelus(Untraceable(), (3, 4, 4))
    assert count.per_site == {"once": 64, "twice": 64, "twice@2": 64, ":relu": 64}


def test_relus_inside_torch_nn_blocks_are_counted():
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)

        def forward(self, x):
            return self.layer(x.flatten(2).transpose(1, 2))

    assert count_drelus(Encoder(), (4, 2, 3)).per_site == {"layer:relu": 6 * 8}


class SequenceFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(16, 2, 32)

    def forward(self, x):  # [1, 16, 4, 4] -> [16 tokens, 1, 16]
        return self.layer(x.flatten(2).permute(2, 0, 1))


class HeadsInTheBatch(nn.Module):
    def __init__(self, act: nn.Module | None = None) -> None:
        super().__init__()
        self.act = act or torch.relu

    def forward(self, x):
        return self.act(x.reshape(len(x) * 4, -1, 2, 2))


@pytest.mark.parametrize(
    ("model", "size", "message"),
    [
        (SequenceFirst(), (16, 4, 4), r"site 'layer:relu': the first dimension must be the batch.*\[16, 1, 32\]"),
        (HeadsInTheBatch(), (4, 4, 4), r"site ':relu': the first dimension must be the batch.*\[4, 4, 2, 2\]"),
        (HeadsInTheBatch(nn.ReLU()), (4, 4, 4), r"site 'act': the first dimension .*\[4, 4, 2, 2\]"),
        (HeadsInTheBatch(SharedReLU2d(4, 2)), (4, 4, 4), r"site 'act': the first dimension .*\[4, 4, 2, 2\]"),
    ],
)
def test_a_site_whose_first_dimension_is_not_the_batch_is_refused(model, size, message):
    with pytest.raises(PlanError, match=message):
        count_drelus(model, size)


def test_what_is_no_relu_is_no_site():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.Hardtanh(), nn.LeakyReLU(), nn.Identity(), nn.Sigmoid(), nn.MaxPool2d(2)
    )
    assert len(Plan.of(model, (3, 4, 4))) == 0


def test_modules_of_plans_are_read_back():
    mask = torch.tensor([True, False, False, True])
    acts = [SharedReLU2d(4, 3), MaskedReLU2d(mask), nn.GELU(), nn.ReLU()]
    plan = Plan.of(nn.Sequential(*acts), (4, 2, 2))
    assert [site.kind for site in plan] == ["shared", "mask", "gelu", "relu"]
    assert plan["0"].prototypes == 3
    assert torch.equal(plan["1"].mask.tensor(), mask)
    assert [site.drelus for site in plan] == [12, 8, 16, 16]


def test_the_model_is_left_as_it_was():
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout())
            self.register_buffer("calls", torch.zeros(()))
            self.last = None

        def forward(self, x):
            self.calls += 1
            self.last = self.body(x)
            return self.last

    model = Counting().train()
    model.body[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert count_drelus(model, (3, 4, 4)).total == 64
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.last is None
    assert [module.training for module in model.modules()] == [True, True, True, False, True, True]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_the_zero_batch_has_the_weights_dtype():
    assert count_drelus(chain().to(torch.float64), (3, 4, 4)).total == 3 * 8 * 16


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_what_cannot_be_counted_says_why():
    with pytest.raises(PlanError, match=r"Sequential does not run on a batch \[1, 5, 4, 4\]"):
        Plan.of(chain(), (5, 4, 4))
    with pytest.raises(PlanError, match="'0' is a ScriptModule"):
        Plan.of(nn.Sequential(torch.jit.script(nn.ReLU())), (3, 4, 4))
    for size in ("3x4x4", (3, -1, 4), (3, 4.0, 4), (), None, 3, (True, 4, 4)):
        with pytest.raises(PlanError, match="input_size must be positive ints"):
            Plan.of(chain(), size)
    with pytest.raises(PlanError, match="input_size must be at most"):
        Plan.of(chain(), (3, 10**12, 10**12))
    with pytest.raises(PlanError, match="needs input_size"):
        count_drelus(chain())
    with pytest.raises(PlanError, match=r"images of \(3, 8, 8\) \(got input_size \(3, 9, 9\)"):
        count_drelus(plan_of_all_kinds(), (3, 9, 9))


def test_input_sizes_are_read():
    assert parse_input_size("3x32x32") == (3, 32, 32)
    for text in ("32x32", "3x32x", "3x0x4", "3,4,5", "3x32x-1", "3x3²x4"):
        with pytest.raises(PlanError, match="must look like 3x32x32"):
            parse_input_size(text)
    for text in ("3x999999999999x999999999999", f"3x32x{'9' * 5000}", "3x8192x8192"):
        with pytest.raises(PlanError, match="must be at most 67,108,864 values an image"):
            parse_input_size(text)


def test_a_mask_without_values_is_refused():
    with pytest.raises(PlanError, match="meta device"):
        Mask.of(torch.ones(4, dtype=torch.bool, device="meta"))
