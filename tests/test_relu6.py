"""ReLU6 as a site: found, counted once, put in and taken out, refused by secure."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from deepshare import convert
from deepshare.nn import SharedReLU2d
from deepshare.plan import Plan, apply_plan
from deepshare.secure.errors import SecureError
from deepshare.secure.lower import lower

SIZE = (3, 4, 4)


class Every(nn.Module):
    """A module, both functional forms, and a plain ReLU between them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act = nn.Conv2d(3, 3, 1), nn.ReLU6()

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.act(self.conv(x)) - 1)
        x = F.relu(x - 0.5)
        y = x * 2
        F.relu6(y, True)
        return y - torch.ops.aten.relu6(x)


class Overwriting(nn.Module):
    """The shortcut carries what the in-place ReLU6 has overwritten."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act = nn.Conv2d(3, 3, 1), nn.ReLU6(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.act(x) + x


def image(scale: float = 1) -> Tensor:
    return scale * torch.randn(2, *SIZE, generator=torch.Generator().manual_seed(0))


def test_a_relu6_is_a_site_of_its_own_kind_and_counted_once():
    plan = Plan.of(Every(), SIZE)
    names = [("act", "relu6"), (":relu6", "relu6"), (":relu", "relu"), (":relu6@2", "relu6"), (":relu6@3", "relu6")]
    assert [(site.name, site.kind) for site in plan] == names
    assert plan.drelus == 5 * 48
    assert "clip at 6 is a comparison more" in plan.table()
    assert "clip at 6" not in plan.replace_all("relu").table()
    assert Plan.from_json(plan.to_json()) == plan


def test_every_form_can_be_replaced_and_the_rest_stays():
    model = Every()
    plan = Plan.of(model, SIZE)
    for name in ("act", ":relu6", ":relu6@2", ":relu6@3"):
        changed = plan.replace(name, "shared", prototypes=3)
        result = apply_plan(model, changed)
        assert Plan.of(result, SIZE) == changed
        assert isinstance(result.get_submodule(name), SharedReLU2d)
        torch.testing.assert_close(result(image()), model(image()), rtol=0, atol=0)  # below 6
    assert not torch.equal(apply_plan(model, plan.replace("act", "relu"))(image(50)), model(image(50)))


def test_a_relu6_is_put_in_too():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU())
    result = apply_plan(model, Plan.of(model, SIZE).replace("1", "relu6"))
    assert type(result[1]) is nn.ReLU6
    torch.testing.assert_close(result(image(50)), model[0](image(50)).clamp(0, 6))


def test_an_in_place_relu6_leaves_its_result_to_later_readers():
    model = Overwriting().eval()
    result = apply_plan(model, Plan.of(model, SIZE).replace("act", "shared", prototypes=3))
    assert isinstance(result, fx.GraphModule)
    torch.testing.assert_close(result(image()), model(image()))


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu6(self.conv(x))


@pytest.mark.parametrize(
    ("model", "node"),
    [(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU6()), "ReLU6 at '1'"), (Functional(), "relu6")],
)
def test_secure_refuses_a_relu6_and_says_what_to_do(model, node):
    with pytest.raises(SecureError, match=rf"{node}.*clips at 6: a second comparison.*Plan.replace, convert"):
        lower(model, SIZE)


def test_secure_takes_what_convert_puts_there():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU6())
    program, _ = lower(convert(model, SIZE, 16), SIZE)
    assert [step.op for step in program.steps] == ["input", "conv2d", "shared"]
