"""When a column kernel may take its gates' leaders by vectors.

Its values cannot show a wrong answer in the interpreter, where an alignment that is stated but not true goes unnoticed;
on a GPU it would be a misaligned access.
"""

import pytest
import torch
from operator_cases import backend_parameters, device_of

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from deepshare.kernels.triton_columns import hinted, in_step  # noqa: E402

DEVICE = device_of("triton")
pytestmark = [mark for parameter in backend_parameters() if parameter.values == ("triton",) for mark in parameter.marks]
COLS = 16
AHEAD = list(range(8, 24))


@triton.jit
def answer(leader_ptr, together_ptr, aligned_ptr, width, COLS: tl.constexpr, VEC: tl.constexpr):
    col = tl.arange(0, COLS)
    in_cols = col < width
    leader_col = tl.load(leader_ptr + col, mask=in_cols, other=0)
    together = in_step(leader_col, col, in_cols, COLS, VEC)
    tl.store(together_ptr, together.to(tl.int32))
    tl.store(aligned_ptr + col, hinted(leader_col, col, together, VEC), mask=in_cols)


@pytest.mark.parametrize(
    ("leaders", "vec", "together"),
    [
        (AHEAD, 4, True),
        (AHEAD, 8, True),
        (list(range(4)) * 4, 4, True),
        (list(range(4)) * 4, 8, False),  # neighbours of 4 alone
        ([c + 4 for c in range(16)], 8, False),  # neighbours, but beside a boundary
        ([c + 1 for c in range(16)], 2, False),
        ([*AHEAD[:15], 0], 8, False),  # one of 16 elsewhere
        ([*AHEAD[:8], *reversed(AHEAD[8:])], 8, False),
        ([0] * 16, 2, False),
        ([0] * 16, 1, True),
        ([*range(8, 16), *range(8)], 8, True),
        (AHEAD[:8], 8, True),  # columns beyond the width do not count
        ([4, 5, 6, 11], 4, False),  # each beside another one's aligned neighbours
        ([2, 5], 2, False),
    ],
)
def test_in_step(leaders: list[int], vec: int, together: bool):
    given = torch.tensor(leaders, dtype=torch.int32, device=DEVICE)
    found = torch.full((1,), -1, dtype=torch.int32, device=DEVICE)
    aligned = torch.empty_like(given)
    answer[(1,)](given, found, aligned, len(leaders), COLS=COLS, VEC=vec)
    assert found.item() == together
    assert aligned.tolist() == (leaders if together else list(range(len(leaders))))
