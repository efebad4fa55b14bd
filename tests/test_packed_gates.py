"""Packed gates: the layout bit by bit, and the way back, in every memory order."""

import pytest
import torch

from deepshare import PackedGates, pack_gates


def test_rows_of_positions_begin_on_bytes():
    gates = torch.zeros(1, 2, 3, 3, dtype=torch.bool)
    gates[0, 0, 0, 0] = gates[0, 0, 2, 2] = gates[0, 1, 0, 1] = True  # positions 0 and 8 of a run of 9, position 1
    assert pack_gates(gates).bits.tolist() == [[[1, 1], [2, 0]]]


def test_channels_last_packs_the_prototypes_of_a_pixel():
    gates = torch.zeros(1, 10, 1, 2, dtype=torch.bool)
    gates[0, 3, 0, 0] = gates[0, 9, 0, 1] = True
    packed = pack_gates(gates.contiguous(memory_format=torch.channels_last))
    assert packed.bits.tolist() == [[8, 0], [0, 2]]


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1), (3, 1, 0, 2), (2, 3, 0, 1), (1, 0, 2, 3)])
@pytest.mark.parametrize("shape", [(2, 5, 3, 4), (1, 1, 1, 1), (3, 9, 1, 1), (0, 3, 2, 2), (2, 3, 7, 9)])
def test_unpack_is_the_inverse(shape, order):
    gates = torch.rand(shape) < 0.5
    stored = gates.permute(order).contiguous().permute([order.index(d) for d in range(4)])
    packed = pack_gates(stored)
    assert torch.equal(packed.unpack(), gates)
    assert packed.fits(stored.float())
    for like in (gates.float(), torch.empty_permuted(shape, (0, 2, 3, 1))):
        again = packed.repack(like)
        assert again.fits(like)
        assert torch.equal(again.unpack(), gates)


def test_it_is_a_plain_tuple():
    packed = pack_gates(torch.ones(1, 3, 2, 2, dtype=torch.bool))
    assert isinstance(packed, PackedGates)
    assert (packed.prototypes, packed.shape, packed.strides) == (3, (1, 3, 2, 2), (12, 4, 2, 1))


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (torch.ones(2, 2), TypeError, r"must be a bool tensor \[N, P, \*S\] \(got torch.float32\)"),
        (True, TypeError, r"must be a bool tensor \[N, P, \*S\] \(got bool\)"),
        (torch.ones(3, dtype=torch.bool), ValueError, r"must be \[N, P, \*S\] \(got \[3\]\)"),
    ],
)
def test_bad_input(value, error, message):
    with pytest.raises(error, match=message):
        pack_gates(value)
