"""From model to program: folding, fixed point, shapes, and the clear refusal of what is not supported."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from secure_cases import bounds, cases, exactly, layers, shared, tiny_resnet, with_statistics
from torch import fx, nn

from deepshare import models
from deepshare.fold import fold_batch_norm
from deepshare.methods.merge import merge_linear
from deepshare.plan import Plan, count_drelus
from deepshare.secure.baseline import run_model
from deepshare.secure.baseline.jobs import Job
from deepshare.secure.errors import SecureError
from deepshare.secure.fixed_point import decode, encode
from deepshare.secure.lower import lower
from deepshare.secure.program import Program

GENERATOR = torch.Generator().manual_seed(4)


def test_encode_rounds_and_decode_is_exact():
    values = torch.tensor([0.4, 0.6, -0.4, -0.6, 1.5, 2.5, -1.5], dtype=torch.float64) * 2.0**-16
    assert encode(values).tolist() == [0, 1, 0, -1, 2, 2, -2]
    integers = torch.tensor([-327677, -327680, 327677, -1, 0, 2**46 + 1])  # CrypTen decodes the first as -5.99995
    assert decode(integers).tolist() == [value / 65536 for value in integers.tolist()]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 2.0**15, -(2.0**15)])
def test_encode_refuses_what_does_not_fit(value):
    with pytest.raises(SecureError, match="images must be"):
        encode(torch.tensor([0.0, value]), name="images")


@pytest.mark.parametrize("make", [lambda: layers(GENERATOR), lambda: tiny_resnet(None), lambda: tiny_resnet(2)])
def test_folding_keeps_the_output(make):
    net = make()
    graph_module = fx.symbolic_trace(net) if not isinstance(net, fx.GraphModule) else copy.deepcopy(net)
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in net.modules())
    channels, size = (4, (3, 4)) if isinstance(net, nn.Sequential) else (1, (8, 8))
    images = torch.randn(5, channels, *size, generator=GENERATOR)
    folded = fold_batch_norm(graph_module)
    assert folded == (norms - 1 if isinstance(net, nn.Sequential) else norms)
    torch.testing.assert_close(graph_module(images), net(images), atol=1e-5, rtol=1e-5)


def test_a_convolution_read_twice_keeps_its_batch_norm():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)

        def forward(self, x):
            y = self.conv(x)
            return self.norm(y) + y

    net = with_statistics(Twice(), GENERATOR)
    program, _ = lower(net, (1, 5, 5))
    assert [step.op for step in program.steps] == ["input", "conv2d", "affine", "add"]


def test_drelus_are_those_of_the_plan():
    for prototypes in (None, 1, 3):
        net = tiny_resnet(prototypes)
        program, _ = lower(net, (1, 8, 8))
        count = count_drelus(net, (1, 8, 8))
        assert program.total_drelus == count.total == Plan.of(net, (1, 8, 8)).drelus
        assert [program.drelus(s) for s in program.steps if s.op in ("relu", "shared")] == list(count.per_site.values())


def test_followers_of_one_source_share_one_comparison():
    program, _ = lower(cases()["follower"].model, (4, 3, 4))
    acts = [step for step in program.steps if step.op == "shared"]
    assert [step.fresh for step in acts] == [True, False, False]
    assert len({step.gates for step in acts}) == 1
    assert [program.drelus(step) for step in acts] == [2 * 12, 0, 0]


def test_the_model_is_left_as_it_was():
    net = tiny_resnet(2).train()
    before = copy.deepcopy(net.state_dict())
    lower(net, (1, 8, 8))
    assert net.training
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


def test_program_survives_its_plain_form():
    program, _ = lower(cases()["mask"].model, (4, 3, 4))
    again = Program.from_plain(program.to_plain())
    assert again.steps == program.steps
    assert again.params == program.params
    assert all(torch.equal(again.public[key], value) for key, value in program.public.items())


def test_clients_view_with_secret_weights_holds_no_weight(tmp_path):
    net = tiny_resnet(2)
    program, tensors = lower(net, (1, 8, 8))
    images = torch.randint(-(2**40), 2**40, (1, 1, 8, 8))
    for weights, expected in (("secret", False), ("public", True)):
        torch.save(Job(program, tensors, images, weights, 1).view(1), tmp_path / "client")
        stored = (tmp_path / "client").read_bytes()
        large = [tensor for tensor in tensors.values() if tensor.numel() >= 8]
        assert [tensor.contiguous().numpy().tobytes() in stored for tensor in large] == [expected] * len(large)
        assert images.numpy().tobytes() in stored
    torch.save(Job(program, tensors, images, "secret", 1).view(0), tmp_path / "server")
    assert images.numpy().tobytes() not in (tmp_path / "server").read_bytes()


class Functional(nn.Module):
    """One function of x between a convolution and nothing."""

    def __init__(self, function) -> None:
        super().__init__()
        self.conv, self.function = nn.Conv2d(1, 4, 3, padding=1), function

    def forward(self, x):
        return self.function(self.conv(x))


class Added(nn.Module):
    """A convolution's result and a buffer; with `twice` the result is read again."""

    def __init__(self, constant, twice=False) -> None:
        super().__init__()
        self.conv, self.twice = nn.Conv2d(1, 4, 3, padding=1), twice
        self.register_buffer("constant", constant)

    def forward(self, x):
        y = self.conv(x)
        return self.constant + y + y if self.twice else self.constant + y


def soft() -> nn.Module:
    act = shared(4, 2, GENERATOR)
    act.soft_channels = 1
    return act


def in_place(x):
    y = F.relu(x, inplace=True)
    return y + x


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (nn.Sequential(nn.Conv2d(1, 4, 3), nn.LPPool2d(2, 2)), r"node '_?1' \(LPPool2d at '1'\) is not supported"),
        (nn.Sequential(nn.MaxPool2d(2, return_indices=True)), "must not return indices"),
        (nn.Sequential(nn.MaxPool2d((2, 1), 1, (1, 0), (9, 1))), "a window holds no element of the image"),
        (nn.Sequential(nn.AdaptiveMaxPool2d(3)), "divide its input evenly"),
        (nn.Sequential(nn.ReLU6()), "clips at 6"),
        (Functional(F.relu6), "clips at 6"),
        (nn.Sequential(nn.Conv2d(1, 4, 3), nn.GELU()), "GELU at '1'.* is not supported; supported are Conv2d"),
        (nn.Sequential(nn.Conv2d(1, 4, 3), soft()), r"SharedReLU2d at '1'.*soft_channels must be 0 \(got 1\)"),
        (nn.Sequential(nn.Conv2d(1, 4, 3, padding_mode="reflect", padding=1)), "zero padding"),
        (nn.Sequential(nn.AdaptiveAvgPool2d(3)), "divide its input evenly"),
        (nn.Sequential(nn.AvgPool2d(2, ceil_mode=True)), "ceil_mode"),
        (Functional(torch.sigmoid), "node 'sigmoid'.*is not supported"),
        (Functional(lambda x: x + 1), "node 'add'.*constant"),
        (Functional(lambda x: x.flatten()), "must keep the batch as its first dimension"),
        (Functional(lambda x: x.view(1, -1)), "must keep the batch as its first dimension"),
        (Functional(lambda x: F.dropout(x, 0.5)), "drops values at inference too"),
        (Added(torch.ones(1)), "must be a bias of a convolution, of its result's shape"),
        (Added(torch.ones(4, 8, 8), twice=True), "must be a bias of a convolution"),
        (Functional(lambda x: x.mean(1)), "mean over H and W"),
        (Functional(lambda x: x.narrow(2, 0, 3)), r"must take channels, narrow\(1, start, length\)"),
        (Functional(lambda x: torch.cat([x, x], 2)), r"join earlier results along their channels, dim=1 \(got dim=2\)"),
        (Functional(in_place), "node 'relu'.*changes 'conv' in place, which 'add' reads afterwards"),
        (Functional(lambda x: (x, x)), "must return"),
        (Functional(lambda x: x if x.sum() > 0 else -x), "cannot be traced"),
        (
            nn.Sequential(nn.Conv2d(3, 4, 3)),
            r"does not run on an image \[1, 8, 8\]: Given groups=1, weight of size.*channels instead$",
        ),
    ],
)
def test_unsupported_is_refused_before_any_process_starts(model, words, monkeypatch):
    monkeypatch.setattr("deepshare.secure.baseline.session.require_crypten", lambda: None)
    monkeypatch.setattr(
        "deepshare.secure.baseline.session.run_jobs", lambda *_, **__: pytest.fail("processes were started")
    )
    with pytest.raises(SecureError, match=words):
        run_model(model.eval(), torch.zeros(1, 1, 8, 8), torch.zeros(1, dtype=torch.long))


POOLS = [
    nn.MaxPool2d(2),
    nn.MaxPool2d(3, 2, 1),
    nn.MaxPool2d(3, 1, 1),
    nn.MaxPool2d((1, 4), (2, 3), (0, 2)),
    nn.MaxPool2d(2, 2, 1, dilation=2),
    nn.MaxPool2d((3, 2), 2, ceil_mode=True),
    nn.MaxPool2d(5, 3, 2, ceil_mode=True),
    nn.MaxPool2d(1, 2),
    nn.AdaptiveMaxPool2d(1),
    nn.AdaptiveMaxPool2d((None, 1)),
]


@pytest.mark.parametrize("size", [(7, 9), (8, 6)])
@pytest.mark.parametrize("pool", POOLS, ids=str)
def test_max_pooling_is_a_tournament(pool, size):
    """Exact on integers; K - 1 comparisons a result, or fewer; each level is one relu step."""
    images = torch.randint(-(2**30), 2**30, (2, 3, *size), generator=GENERATOR)
    program, _ = lower(nn.Sequential(pool), (3, *size))
    expected = pool(images.double())
    assert torch.equal(bounds(program, {}, images).centre, expected)
    assert program.steps[-1].shape == expected.shape[1:]
    assert {step.op for step in program.steps} <= {"input", "gather", "narrow", "sub", "relu", "add", "concat"}
    kernel = getattr(pool, "kernel_size", (size[0] // expected.shape[2], size[1] // expected.shape[3]))
    taps = math.prod(kernel) if isinstance(kernel, tuple) else kernel**2
    assert sum(step.op == "relu" for step in program.steps) == math.ceil(math.log2(taps))
    assert program.total_drelus <= (taps - 1) * expected[0].numel()
    assert len({step.name for step in program.steps}) == len(program.steps)


def test_overlapping_windows_share_their_columns():
    """ResNet's stem pool: 2 * H * W/2 comparisons of rows and 2 * H/2 * W/2 of columns are 6 a result, not 8."""
    program, _ = lower(nn.Sequential(nn.MaxPool2d(3, 2, 1)), (1, 8, 8))
    assert program.total_drelus == 6 * 16
    program, _ = lower(nn.Sequential(nn.MaxPool2d(2)), (1, 8, 8))
    assert program.total_drelus == 3 * 16


@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.max_pool2d(x, 3, stride=2, padding=1),
        lambda x: torch.max_pool2d(x, 2, ceil_mode=True),
        lambda x: F.adaptive_max_pool2d(x, 1),
        lambda x: F.avg_pool2d(x, x.shape[2:]).view(x.size(0), -1),
        lambda x: F.avg_pool2d(F.dropout(x, training=False), (2, 1), (1, 2)).reshape(x.shape[0], -1),
        lambda x: torch.relu_(x),
    ],
)
def test_functions_are_lowered_as_modules_are(function):
    net = Functional(function).eval()
    images = torch.randn(2, 1, 7, 7, generator=GENERATOR)
    program, tensors = lower(net, (1, 7, 7))
    expected = net(images).double()
    torch.testing.assert_close(exactly(program, tensors, encode(images)), expected, atol=2e-4, rtol=0)


@pytest.mark.parametrize("name", ["resnet20", "wrn-16-8", "vgg16-bn-fc", "mobilenetv1", "mobilenetv2", "hrn-2x5x3x"])
def test_every_family_is_lowered(name):
    """Depthwise convolutions, hidden linear layers, inverted residuals; the count, and what comes out."""
    net = with_statistics(models.create(name, num_classes=3, width=4), GENERATOR)
    images = torch.randn(2, 3, 16, 16, generator=GENERATOR)
    program, tensors = lower(net, (3, 16, 16))
    assert program.total_drelus == Plan.of(net, (3, 16, 16)).drelus
    expected = net(images).double()
    error = (exactly(program, tensors, encode(images)) - expected).abs().max()
    assert error <= 1e-2 * expected.abs().max()


@pytest.mark.parametrize("bias_maps", [False, True])
def test_merged_convolutions_are_lowered(bias_maps):
    """What a culled site leaves: two convolutions as one, whose bias is another near the border."""
    net = nn.Sequential(nn.Conv2d(1, 3, 1), nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 3))
    merged, _ = merge_linear(net, (1, 8, 8), bias_maps=bias_maps, max_cost=math.inf)
    program, tensors = lower(merged, (1, 8, 8))
    convolutions = [step for step in program.steps if step.op == "conv2d"]
    assert len(convolutions) == 2 - bias_maps
    assert program.params[convolutions[-1].params["bias"]].shape == ((4, 8, 8) if bias_maps else (4, 1, 1))
    images = torch.randn(2, 1, 8, 8, generator=GENERATOR)
    expected = merged.eval()(images).double()
    torch.testing.assert_close(exactly(program, tensors, encode(images)), expected, atol=2e-4, rtol=0)


def test_a_relu_of_ones_own_is_lowered_as_what_it_does():
    class Residual(nn.ReLU):
        def forward(self, x):
            return x + F.relu(x)

    program, _ = lower(nn.Sequential(Residual()), (1, 2, 2))
    assert [step.op for step in program.steps] == ["input", "relu", "add"]


class Elsewhere(torch.Tensor):
    """Stands for images on another device: whatever is computed from them stays there, but for cpu()."""

    def cpu(self):
        return self.as_subclass(torch.Tensor)


def test_images_on_another_device_are_brought_to_the_cpu(monkeypatch):
    class JobSeenError(Exception):
        pass

    def look(jobs, **_):
        raise JobSeenError(type(jobs[0].images))

    monkeypatch.setattr("deepshare.secure.baseline.session.require_crypten", lambda: None)
    monkeypatch.setattr("deepshare.secure.baseline.session.run_jobs", look)
    images = torch.zeros(1, 1, 8, 8, requires_grad=True).as_subclass(Elsewhere)
    with pytest.raises(JobSeenError) as seen:
        run_model(nn.Sequential(nn.Flatten()), images, torch.zeros(1, dtype=torch.long))
    assert seen.value.args == (torch.Tensor,)


def test_a_model_that_does_not_run_is_refused_without_a_word_on_the_terminal(capfd):
    with pytest.raises(SecureError, match=r"does not run on an image \[1, 8, 8\]: mat1 and mat2 shapes"):
        lower(nn.Sequential(nn.Flatten(), nn.Linear(3, 2)), (1, 8, 8))
    assert capfd.readouterr() == ("", "")


def test_a_weight_out_of_range_is_named():
    net = nn.Sequential(nn.Conv2d(1, 2, 3))
    net[0].weight.data[0, 0, 0, 0] = float("nan")
    with pytest.raises(SecureError, match=r"0\.weight must be finite"):
        lower(net, (1, 8, 8))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"weights": "hidden"}, "weights must be 'public' or 'secret'"),
        ({"provider": "HE"}, "provider must be 'TFP' or 'TTP'"),
        ({"images": torch.zeros(2, 1, 8, 8, dtype=torch.uint8)}, "images must be a float tensor"),
        ({"images": torch.zeros(1, 8, 8)}, "images must be a float tensor"),
        ({"images": torch.zeros(2, 1, 8, 8).fill_(float("nan"))}, "images must be finite"),
        ({"labels": torch.zeros(3, dtype=torch.long)}, "labels must be integers"),
        ({"batch": 0}, r"batch must be in 1\.\.2"),
        ({"batch": 3}, r"batch must be in 1\.\.2"),
    ],
)
def test_bad_arguments_are_named(changed, words, monkeypatch):
    monkeypatch.setattr("deepshare.secure.baseline.session.require_crypten", lambda: None)
    monkeypatch.setattr(
        "deepshare.secure.baseline.session.run_jobs", lambda *_, **__: pytest.fail("processes were started")
    )
    arguments = {"images": torch.zeros(2, 1, 8, 8), "labels": torch.zeros(2, dtype=torch.long), **changed}
    with pytest.raises(SecureError, match=words):
        run_model(nn.Sequential(nn.Conv2d(1, 4, 3)), **arguments)


def test_missing_crypten_says_how_to_install_it(monkeypatch):
    """The one list of what CrypTen needs serves the run and the doctor."""
    monkeypatch.setattr("deepshare.secure.baseline.crypten_import.NEEDS", ("crypten_that_nobody_has",))
    with pytest.raises(
        SecureError,
        match=r"the baseline needs crypten_that_nobody_has, not installed.*install 'deepshare\[crypten\]' &&",
    ):
        run_model(nn.Sequential(nn.Flatten()), torch.zeros(1, 1, 8, 8), torch.zeros(1, dtype=torch.long))
