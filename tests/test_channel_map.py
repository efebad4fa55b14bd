"""ChannelMap: the balanced map, its inverse, what it refuses, and what it does with a checkpoint."""

import copy
import itertools
import pickle
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepshare import ChannelMap


def members_of(fewer: ChannelMap) -> list[list[int]]:
    """The channels of each prototype, read from members and offsets."""
    starts = fewer.offsets.tolist()
    return [fewer.members[a:b].tolist() for a, b in itertools.pairwise(starts)]


def test_balanced_is_c_mod_p():
    fewer = ChannelMap.balanced(7, 3)
    assert fewer.pi.tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert fewer.pi.dtype == fewer.members.dtype == fewer.offsets.dtype == torch.int32
    assert (fewer.channels, fewer.prototypes) == (7, 3)
    assert members_of(fewer) == [[0, 3, 6], [1, 4], [2, 5]]


@settings(deadline=None, derandomize=True)
@given(st.data(), st.integers(1, 40))
def test_inverse_of_any_map(data: st.DataObject, prototypes: int):
    pi = data.draw(st.lists(st.integers(0, prototypes - 1), min_size=prototypes, max_size=90))
    groups = members_of(ChannelMap(torch.tensor(pi), prototypes))
    assert groups == [[c for c, p in enumerate(pi) if p == prototype] for prototype in range(prototypes)]


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8])
def test_any_integers_become_int32(dtype: torch.dtype):
    assert ChannelMap(torch.tensor([1, 0, 1], dtype=dtype), 2).pi.dtype == torch.int32


def test_the_map_is_a_copy():
    pi = torch.tensor([0, 1, 0], dtype=torch.int32)
    fewer = ChannelMap(pi, 2)
    pi.fill_(1)
    assert fewer.pi.tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    ("pi", "prototypes", "kind", "message"),
    [
        ([0, 1], 1, TypeError, "ChannelMap: pi must be an integer tensor [C] (got list)"),
        (torch.zeros(3), 1, TypeError, "pi must be an integer tensor [C] (got torch.float32 [3])"),
        (torch.zeros(2, 2, dtype=torch.int32), 1, TypeError, "(got torch.int32 [2, 2])"),
        (torch.tensor([True, False]), 2, TypeError, "(got torch.bool [2])"),
        (torch.tensor([0, 2, 1]), 2, ValueError, "pi must have values in 0..1 (got 0..2)"),
        (torch.tensor([0, -1, 1]), 2, ValueError, "pi must have values in 0..1 (got -1..1)"),
        (torch.tensor([0, 2**32, 1]), 2, ValueError, "(got 0..4294967296)"),
        (torch.tensor([0, 0]), 0, ValueError, "prototypes must be an int in 1..2 (got 0)"),
        (torch.tensor([0, 0]), 3, ValueError, "prototypes must be an int in 1..2 (got 3)"),
        (torch.tensor([0, 0]), True, ValueError, "prototypes must be an int in 1..2 (got True)"),
        (torch.tensor([0, 0]), 1.0, ValueError, "prototypes must be an int in 1..2 (got 1.0)"),
        (torch.zeros(0, dtype=torch.int32), 1, ValueError, "prototypes must be an int in 1..0 (got 1)"),
    ],
)
def test_bad_maps(pi, prototypes, kind, message):
    with pytest.raises(kind, match=re.escape(message)):
        ChannelMap(pi, prototypes)


@pytest.mark.parametrize("prototypes", [0, -1, 5, 2.0, None, True])
def test_bad_balanced(prototypes):
    with pytest.raises(ValueError, match=r"ChannelMap: prototypes must be an int in 1\.\.4 \(got "):
        ChannelMap.balanced(4, prototypes)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_loading_rebuilds_the_inverse(dtype: torch.dtype, assign: bool):
    wanted = torch.tensor([2, 0, 0, 1, 2], dtype=dtype)
    fewer = ChannelMap.balanced(5, 3)
    assert list(fewer.state_dict()) == ["pi"]
    fewer.load_state_dict({"pi": wanted}, assign=assign)
    assert fewer.pi.dtype == torch.int32
    assert fewer.pi.tolist() == wanted.tolist()
    assert members_of(fewer) == [[1, 2], [3], [0, 4]]


@pytest.mark.parametrize(
    ("pi", "message"),
    [
        (torch.tensor([0, 1, 3, 0, 0]), "pi must have values in 0..2 (got 0..3)"),
        (torch.tensor([0, 1, 2]), "pi must have 5 channels (got [3] for pi)"),
        (torch.tensor([0.0, 1, 2, 0, 1]), "pi must be an integer tensor [C]"),
        (torch.tensor([0, 1, 0, 1, 0]), "pi must be a map to 3 prototypes (got one to 2)"),
    ],
)
def test_loading_refuses_a_wrong_map_and_keeps_the_old(pi: torch.Tensor, message: str):
    fewer = ChannelMap.balanced(5, 3)
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        fewer.load_state_dict({"pi": pi})
    assert fewer.pi.tolist() == [0, 1, 2, 0, 1]
    assert members_of(fewer) == [[0, 3], [1, 4], [2]]


def test_a_map_with_unused_prototypes_loads_into_one_like_it():
    fewer = ChannelMap(torch.tensor([1, 0, 1]), 3)
    other = ChannelMap(torch.tensor([0, 1, 1]), 3)
    other.load_state_dict(fewer.state_dict())
    assert members_of(other) == [[1], [0, 2], []]


def test_on_the_meta_device():
    with torch.device("meta"):
        fewer = ChannelMap.balanced(5, 3)
    assert (fewer.pi.shape, fewer.members.shape, fewer.offsets.shape) == ((5,), (5,), (4,))
    fewer.load_state_dict(ChannelMap.balanced(5, 3).state_dict(), assign=True)
    assert members_of(fewer) == [[0, 3], [1, 4], [2]]
    with pytest.raises(ValueError, match="got one to 2"):
        ChannelMap.balanced(5, 3).to("meta").load_state_dict(ChannelMap.balanced(5, 2).state_dict(), assign=True)


def test_a_missing_map_is_reported():
    with pytest.raises(RuntimeError, match=r"Missing key.*pi"):
        ChannelMap.balanced(4, 2).load_state_dict({})


def test_copies_keep_everything():
    fewer = ChannelMap(torch.tensor([1, 0, 1]), 2)
    for other in (copy.deepcopy(fewer), pickle.loads(pickle.dumps(fewer)), fewer.double().half()):
        assert members_of(other) == [[1], [0, 2]]
        assert other.pi.dtype == torch.int32


def test_repr():
    assert repr(ChannelMap.balanced(4, 2)) == "ChannelMap(channels=4, prototypes=2)"
