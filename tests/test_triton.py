"""The Triton kernels against the reference where tiles, chunks and blocks of prototypes meet their edges.

tests/test_shared_relu.py runs random cases on every backend; shapes there mostly fit one tile. Here tiles are made
small, so that an interpreted launch of a few hundred elements has many of them, with remainders in every direction.
"""

from dataclasses import replace

import pytest
import torch
from operator_cases import INTERPRETED, Case, assert_agrees, backend_parameters, device_of, inputs, run, truncates

TRITON = [parameter for parameter in backend_parameters() if parameter.values == ("triton",)]
pytestmark = pytest.mark.parametrize("backend", TRITON)

# inner 33, 129: rows of several tiles with a remainder; 1 (two dimensions): channels last; 2: rows narrower than a tile
SHAPES = [(2, 5, 33), (5, 7), (1, 2, 129), (1, 1, 1), (7, 3, 2), (2, 33)]
SOFT = [pytest.param(0, marks=pytest.mark.slow), 2, 99]


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 16 elements, at most 4 chunks of several tiles, a second pass in steps of 2 chunks by 2 channels."""
    if not INTERPRETED:
        pytest.skip("tiles of 16 elements are for the interpreter; a GPU runs the launched sizes")
    from deepshare.kernels import triton_launch_backward, triton_tiles

    for module, values in (
        (
            triton_tiles,
            {"TILE_BYTES": 64, "BACKWARD_TILE": 16, "BACKWARD_TILE_DOUBLE": 8, "COLUMNS": 8, "MAX_CHUNKS": 4},
        ),
        (
            triton_launch_backward,
            {"WANTED_PROGRAMS": 8, "CHUNK_ROWS": 2, "SOFT_TILE_LEAST": 8, "SOFT_LANES": 4, "SOFT_TILE": 16}
            | {"SOFT_TILE_DOUBLE": 8, "SUM_ROWS": 2, "SUM_COLS": 2},
        ),
    ):
        for name, value in values.items():
            monkeypatch.setattr(module, name, value)


def check(case: Case, backend: str) -> None:
    given = inputs(case, device_of(backend))
    assert_agrees(case, given, run(case, given, backend), run(case, given, "reference"), truncates(backend, case.dtype))


def case_of(shape: tuple[int, ...], prototypes: int, soft: int, **changes: object) -> Case:
    """A case with the soft path given as a tensor, so that 0 too runs the soft kernels."""
    channels = shape[1]
    plain = Case(seed=sum(shape), shape=shape, prototypes=min(prototypes, channels), soft=min(soft, channels))
    return replace(plain, soft_as_tensor=True, **changes)


@pytest.mark.parametrize("source_channels", [None, 6])
@pytest.mark.parametrize("soft", SOFT)
@pytest.mark.parametrize("prototypes", [1, 5])
@pytest.mark.parametrize("shape", SHAPES)
def test_soft_gates_over_many_tiles(small_tiles, backend, shape, prototypes, soft, source_channels):
    check(case_of(shape, prototypes, soft, map_kind="random", source_channels=source_channels), backend)


@pytest.mark.parametrize("source_channels", [None, 6])
@pytest.mark.parametrize("shape", SHAPES)
def test_hard_gates_over_many_tiles(small_tiles, backend, shape, source_channels):
    case = case_of(shape, 5, 0, map_kind="random", source_channels=source_channels)
    check(replace(case, soft_as_tensor=False), backend)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "permuted", "sliced"])
def test_dtypes_and_layouts_over_many_tiles(small_tiles, backend, layout, dtype):
    other = "contiguous" if layout == "channels_last" else "channels_last"
    case = case_of((2, 5, 3, 7), 2, 3, source_channels=3, dtype=dtype, x_layout=layout)
    check(replace(case, grad_layout=other, source_layout=other), backend)


@pytest.mark.parametrize("shape", [(2, 33, 7), (9, 33)])
def test_a_prototype_mapped_elsewhere_still_gets_its_gradient(small_tiles, backend, shape):
    """All channels look at the last prototype; the first ones are prototypes without members."""
    check(case_of(shape, 3, 33, map_kind="one"), backend)


@pytest.mark.parametrize("shape", [(3, 8, 40), (40, 8)])
def test_nan_stays_where_it_belongs(backend, shape):
    """A NaN reaches its own y and dx and its own channel's sums; a lane outside the tensor adds nothing anywhere."""
    case = case_of(shape, 2, 4)
    given = inputs(case, device_of(backend))
    given.x[(1, 5) + (0,) * (len(shape) - 2)] = float("nan")
    ours, expected = run(case, given, backend), run(case, given, "reference")
    assert torch.equal(ours.y.isnan(), expected.y.isnan())
    assert torch.equal(ours.dx.isnan(), expected.dx.isnan())
    assert ours.dalpha.isnan().tolist() == [c == 5 for c in range(8)]


def test_two_runs_give_the_same_bits(backend):
    case = case_of((4, 12, 65), 5, 7, map_kind="random", source_channels=9)
    given = inputs(case, device_of(backend))
    first, second = run(case, given, backend), run(case, given, backend)
    for name in ("y", "dx", "dsource", "dalpha", "dbeta"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name


@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 4, 0), (0, 4)])
def test_empty_input_has_zero_sums(backend, shape):
    case = case_of(shape, 2, 3, source_channels=2)
    result = run(case, inputs(case, device_of(backend)), backend)
    assert result.y.shape == result.dx.shape == shape
    assert result.dsource is not None
    assert not result.dalpha.any()
    assert not result.dbeta.any()
