"""Two convolutions as one: against running both, over random geometries."""

import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from deepshare.methods.conv_algebra import BiasMapConv2d, Convolution, Geometry, MergeError

SIZE = (15, 14)
small = st.integers(1, 3)
pairs = st.tuples(small, small)


@st.composite
def convolutions(draw, inputs: int | None = None, *, padding=None, kernel=None, groups=(1, 2, 4)) -> nn.Conv2d:
    inputs = inputs or draw(st.sampled_from([4, 8]))
    pads = draw(padding if padding is not None else st.tuples(st.integers(0, 2), st.integers(0, 2)))
    made = nn.Conv2d(
        inputs,
        draw(st.sampled_from([4, 8])),
        draw(kernel if kernel is not None else pairs),
        draw(st.tuples(st.integers(1, 2), st.integers(1, 2))),
        pads,
        draw(st.tuples(st.integers(1, 2), st.integers(1, 2))),
        draw(st.sampled_from(groups)),
        bias=draw(st.booleans()),
    )
    return made.double()


def of(module: nn.Module) -> Convolution:
    made = Convolution.of(module)
    assert made is not None
    return made


def image(channels: int) -> Tensor:
    return torch.randn(2, channels, *SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def agree(merged: Convolution, x: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(merged.module(x, linear=False)(x), wanted, atol=1e-11, rtol=1e-11)


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_a_second_that_pads_nothing_merges_exactly(data):
    first = data.draw(convolutions())
    second = data.draw(convolutions(first.out_channels, padding=st.just((0, 0))))
    x = image(first.in_channels)
    between = first(x)
    merged = of(second).after(of(first), tuple(between.shape[2:]))
    assert of(second).geometry.same_border_after(of(first).geometry)
    assert merged.bias.dim() == 1
    assert merged.geometry.out_size(SIZE) == second(between).shape[2:]
    agree(merged, x, second(between))


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_a_pointwise_first_merges_exactly_with_a_bias_per_position(data):
    first = data.draw(convolutions(kernel=st.just((1, 1)), padding=st.just((0, 0))))
    second = data.draw(convolutions(first.out_channels))
    x = image(first.in_channels)
    between = first(x)
    merged = of(second).after(of(first), tuple(between.shape[2:]))
    assert of(second).geometry.same_border_after(of(first).geometry)
    assert (merged.bias.dim() == 3) == (second.padding != (0, 0) and first.bias is not None)
    agree(merged, x, second(between))


def test_each_dimension_has_its_own_border():
    """A 1x3 then a 3x1: both pad, each where the other has one tap."""
    first = nn.Conv2d(3, 4, (1, 3), padding=(0, 1), bias=False).double()
    second = nn.Conv2d(4, 5, (3, 1), padding=(1, 0)).double()
    x = image(3)
    assert of(second).geometry.same_border_after(of(first).geometry)
    merged = of(second).after(of(first), SIZE)
    assert merged.geometry.kernel == (3, 3)
    agree(merged, x, second(first(x)))


def test_two_padded_3x3_are_a_5x5_inside_and_not_at_the_border():
    first, second = (nn.Conv2d(4, 4, 3, padding=1).double() for _ in range(2))
    x = image(4)
    assert not of(second).geometry.same_border_after(of(first).geometry)
    merged = of(second).after(of(first), None)
    assert (merged.geometry.kernel, merged.geometry.padding) == ((5, 5), (2, 2))
    assert merged.geometry.multiplications(9) * 18 == 25 * 2 * of(first).geometry.multiplications(9)
    difference = (merged.module(x, linear=False)(x) - second(first(x))).abs()
    assert difference[:, :, 1:-1, 1:-1].max() < 1e-12
    border = torch.ones(SIZE, dtype=torch.bool)
    border[1:-1, 1:-1] = False
    assert difference[:, :, border].min() > 1e-6


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_a_sum_of_two_centred_convolutions_merges_exactly(data):
    """Odd kernels, padding half their reach: the images' size decides nothing, whatever strides and dilations."""
    odd = st.tuples(st.sampled_from([1, 3, 5]), st.sampled_from([1, 3, 5]))
    one, other = data.draw(convolutions(kernel=odd)), data.draw(convolutions(4, kernel=odd))
    sizes = (one.in_channels, one.out_channels)
    centred = [
        nn.Conv2d(*sizes, conv.kernel_size, one.stride, _half_reach(conv), conv.dilation, conv.groups).double()
        for conv in (one, other)
    ]
    x = image(one.in_channels)
    agree(of(centred[0]).beside(of(centred[1]), SIZE), x, centred[0](x) + centred[1](x))


def _half_reach(conv: nn.Conv2d) -> tuple[int, int]:
    return tuple(d * (k - 1) // 2 for d, k in zip(conv.dilation, conv.kernel_size, strict=True))  # type: ignore


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_a_sum_of_any_two_merges_exactly_or_is_refused(data):
    one, other = data.draw(convolutions()), data.draw(convolutions(4))
    sizes = (one.in_channels, one.out_channels)
    other = nn.Conv2d(*sizes, other.kernel_size, one.stride, other.padding, other.dilation, bias=False).double()
    x = image(one.in_channels)
    a, b = one(x), other(x)
    try:
        merged = of(one).beside(of(other), SIZE)
    except MergeError:
        event("refused")
    else:
        event("merged")
        agree(merged, x, a + b)


@pytest.mark.parametrize(("kernel", "padding", "stride"), [(3, 1, 1), (3, 1, 2), (5, 2, 2), (1, 0, 3)])
def test_a_projection_beside_the_usual_convolutions(kernel, padding, stride):
    one = nn.Conv2d(4, 6, kernel, stride, padding).double()
    other = nn.Conv2d(4, 6, 1, stride, bias=False).double()
    x = image(4)
    merged = of(one).beside(of(other), SIZE)
    assert merged.geometry == of(one).geometry
    agree(merged, x, one(x) + other(x))


def test_the_value_itself_beside_a_grouped_convolution_keeps_the_groups():
    one, x = nn.Conv2d(4, 4, 3, padding=1, groups=2).double(), image(4)
    merged = of(one).beside(Convolution.identity(4, x), SIZE)
    assert merged.geometry == of(one).geometry
    agree(merged, x, one(x) + x)


def test_what_has_no_common_padding_is_refused():
    """3x3 without padding reads further right than the 1x1 that pads; padding is the same at both ends."""
    with pytest.raises(MergeError, match=r"paddings \(0, 0\) and \(1, 1\)"):
        Geometry(1, 1, kernel=(3, 3)).beside(Geometry(1, 1, padding=(1, 1)), SIZE)


def test_unlike_strides_are_refused():
    with pytest.raises(MergeError, match="strides"):
        Geometry(1, 1, stride=(1, 1)).beside(Geometry(1, 1, stride=(2, 2)), SIZE)


def test_a_batch_norm_in_front_and_a_map_in_a_chain():
    norm, first, second = nn.BatchNorm2d(4).double(), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    norm.bias.data.normal_()
    norm.eval()
    first, second, x = first.double(), second.double(), image(4)
    with_map = of(first).after(of(norm), SIZE)
    assert with_map.geometry == of(first).geometry
    again = of(with_map.module(x, linear=False))
    agree(of(second).after(again, SIZE), x, second(first(norm(x))))
    with pytest.raises(MergeError, match="per position"):
        of(second).after(again, None)


def test_what_is_no_convolution_of_zeros_is_none():
    assert Convolution.of(nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect")) is None
    assert Convolution.of(nn.Conv2d(2, 2, 2, padding="same")) is None
    assert Convolution.of(nn.BatchNorm2d(2, track_running_stats=False)) is None
    assert Convolution.of(nn.ConvTranspose2d(2, 2, 3)) is None
    assert of(nn.Conv2d(2, 2, 3, padding="same", dilation=2)).geometry.padding == (2, 2)
    assert of(nn.Conv2d(2, 2, 3, padding="valid")).geometry.padding == (0, 0)


def test_a_bias_map_refuses_another_image_size():
    module = BiasMapConv2d(nn.Conv2d(1, 2, 3, bias=False), torch.zeros(2, 4, 4))
    assert module(torch.zeros(1, 1, 6, 6)).shape == (1, 2, 4, 4)
    with pytest.raises(RuntimeError):
        module(torch.zeros(1, 1, 8, 8))
