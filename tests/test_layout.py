"""Tensors as the kernels see them: (outer, channels, inner) in memory order."""

import pytest
import torch

from deepshare.kernels.layout import Geometry, dense, geometry, in_order_of


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        (torch.zeros(2, 3, 4, 5), Geometry(2, 3, 20)),
        (torch.zeros(2, 3, 4, 5).contiguous(memory_format=torch.channels_last), Geometry(40, 3, 1)),
        (torch.zeros(4, 2, 3, 5).permute(1, 2, 0, 3), Geometry(8, 3, 5)),
        (torch.zeros(3, 2, 4).permute(1, 0, 2), Geometry(1, 3, 8)),
        (torch.zeros(7, 3), Geometry(7, 3, 1)),
        (torch.zeros(2, 3, 1, 1), Geometry(2, 3, 1)),
    ],
)
def test_geometry(x: torch.Tensor, expected: Geometry):
    assert geometry(x) == expected
    assert dense(x) is x
    assert in_order_of(x, x) is x


@pytest.mark.parametrize(
    "x",
    [
        torch.arange(48.0).reshape(2, 4, 6)[:, ::2],
        torch.arange(8.0).reshape(2, 4, 1).expand(2, 4, 3),
        torch.arange(96.0).reshape(4, 6, 4).permute(1, 2, 0)[:, 1:3],
    ],
)
def test_what_is_not_dense_is_copied_as_empty_like_lays_it_out(x: torch.Tensor):
    copy = dense(x)
    assert copy.stride() == torch.empty_like(x).stride()
    assert torch.equal(copy, x)


def test_another_order_is_copied_into_x_s_order():
    x = torch.zeros(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    source = torch.randn(2, 7, 4, 5)
    ordered = in_order_of(source, x)
    assert torch.equal(ordered, source)
    assert ordered.is_contiguous(memory_format=torch.channels_last)
