"""One graph for train() and eval(): what a trace keeps, and which traces are refused."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from plan_models import (
    SIZE,
    AsksForATensor,
    OptionalArguments,
    TrainingBranch,
    TrainingDependent,
    all_shared_in_full,
    image,
    led_by_first,
)
from torch import fx

from deepshare.fuse import fuse
from deepshare.plan import Plan, PlanError, apply_plan


def test_one_graph_must_serve_training_and_evaluation():
    plan = Plan.of(TrainingBranch(), SIZE)
    with pytest.raises(PlanError, match=r"other things in train\(\) than in eval\(\).*randn_like"):
        apply_plan(TrainingBranch(), led_by_first(plan, 1))
    swapped = apply_plan(TrainingBranch(), plan.replace("act2", "shared", prototypes=1))
    assert not torch.equal(swapped.train()(image()), swapped(image()))  # the branch is still taken


def test_arguments_beside_the_image_keep_their_defaults():
    model = OptionalArguments().eval()
    plan = led_by_first(Plan.of(model, SIZE), 4)
    result = apply_plan(model, plan)
    hidden = model.conv(image())
    torch.testing.assert_close(result(image()), (hidden.relu() - 0.5) * (hidden >= 0))
    with pytest.raises(TypeError, match="mask"):
        result(image(), mask=image())


def test_a_trace_that_computes_something_else_is_refused():
    plan = Plan.of(AsksForATensor(), SIZE)
    with pytest.raises(PlanError, match=r"AsksForATensor cannot be traced: the trace returns other values than a run"):
        apply_plan(AsksForATensor(), led_by_first(plan, 1))
    swapped = apply_plan(AsksForATensor(), all_shared_in_full(plan))
    torch.testing.assert_close(swapped(image()), swapped.act2(swapped.act1(swapped.conv(image())) - 1))


class NotDropping(TrainingDependent):
    """The argument is the mode's opposite."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act2(F.dropout(self.act1(self.conv(x)), p=0.5, training=not self.training) - 0.5)


@pytest.mark.parametrize("make", [TrainingDependent, NotDropping])
def test_what_follows_the_mode_by_an_argument_goes_on_following_it(make):
    model = make().eval()
    plan = all_shared_in_full(Plan.of(model, SIZE)).replace("act2", "shared", leader="act1")
    plan = plan.replace("act1", "shared", prototypes=4)
    result = apply_plan(model, plan)
    assert isinstance(result, fx.GraphModule)
    assert list(result.state_dict())[:2] == list(model.state_dict())
    buffer = io.BytesIO()
    torch.save(result, buffer)
    buffer.seek(0)
    again = apply_plan(result, plan.replace("act2", "relu").replace("act2", "shared", leader="act1"))
    compiled = torch.compile(copy.deepcopy(result), backend="aot_eager", fullgraph=True)
    twins = [copy.deepcopy(result), torch.load(buffer, weights_only=False), fuse(result, SIZE), again, compiled]
    for twin in (result, *twins):
        for training in (True, False, True):
            twin.train(training)
            drops = training is (make is TrainingDependent)
            assert torch.equal(twin(image()), twin(image())) is not drops
    hidden = model.conv(image())
    expected = (F.relu(hidden) - 0.5) * (hidden >= 0)
    if make is TrainingDependent:
        torch.testing.assert_close(result.eval()(image()), expected)
