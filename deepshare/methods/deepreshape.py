"""DeepReShape's networks (Jha and Reagen 2024) as model specs: HybReNets, BaseCh and StageCh. docs/deepreshape.md."""

import math
import re
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import Any

from deepshare import models
from deepshare.methods.equalization import SHRINK, EqualizationError, equalize_depth, equalize_width
from deepshare.models.families import HYBRID_BLOCKS

WIDTH = 16  # m of the paper's HybReNets (Tables 16 and 17)
WIDTHS = (16, 32, 64, 128, 256)  # m of its BaseCh networks (appendix J)
FACTORS = (2, 3, 4, 5, 6, 7, 8)  # alpha = beta = gamma of its StageCh networks
LARGEST_LAST = 3  # gamma < 4: section 4.1 and appendix H.2, which bounds the FLOPs of the last stage
ALPHA = 2  # step 2 of section 4.3: the first factor with which stage 1 dominates
_HYBRIDS = {blocks: name for name, blocks in HYBRID_BLOCKS.items()}
Spec = dict[str, Any]


def hybrid(name: str, *, m: int = WIDTH, num_classes: int = 100, in_channels: int = 3, stem_relu: bool = True) -> Spec:
    """The spec of a HybReNet, such as "hrn-5x5x3x" (blocks of ResNet18) or "hrn34-4x6x3x" (of ResNet34).

    The stem's ReLU is there and counted, as in the paper: 343,040 ReLUs for hrn-5x5x3x at 32x32 (Table 16).

    Raises:
        ValueError: the name is no HybReNet's, or `models.create` refuses a size.
    """
    if not isinstance(name, str) or not re.match("hrn(34)?-", name) or not models.is_name(name):
        raise ValueError(f"hybrid: name must look like hrn-5x5x3x or hrn34-4x6x3x (got {name!r:.80})")
    spec = {
        "name": name,
        "num_classes": num_classes,
        "width": m,
        "stem_relu": stem_relu,
        "in_channels": in_channels,
    }
    models.shapes_only(spec)
    return spec


def with_factors(spec: Spec, factors: Sequence[int], *, m: int | None = None) -> Spec:
    """The spec with other channel factors, and base channels m: unequal factors under a HybReNet's name, if it has one.

    Raises ValueError: not one factor fewer than stages, or a size that `models.create` refuses.
    """
    blocks, old = models.shape_of(spec)
    if len(factors) != len(old):
        raise ValueError(f"with_factors: {spec['name']} needs {len(old)} factors (got {tuple(factors)})")
    rest = {key: value for key, value in spec.items() if key not in ("multipliers", "blocks")}
    result = {**rest, "width": spec.get("width") if m is None else m}
    if blocks in _HYBRIDS and len(factors) == 3 and len(set(factors)) > 1:
        result["name"] = f"{_HYBRIDS[blocks]}-{'x'.join(map(str, factors))}x"
    else:
        result |= {"multipliers": tuple(factors), "blocks": blocks}
    models.shapes_only(result)
    return result


def equalized(spec: Spec, order: Sequence[int | str], *, m: int = WIDTH) -> list[Spec]:
    """Step 1 of section 4.3: the ReLU-equalized forms of a network, its depth kept, with the smallest factors.

    For ResNet18 and S3 > S2 > S4 > S1: hrn-5x5x3x, hrn-5x7x2x, hrn-6x6x2x, hrn-7x5x2x (`Equalization.minimal`).

    Args:
        spec: of the network to redesign, such as {"name": "resnet18", "num_classes": 100, "stem_relu": True}.
        order: its stages from least to most critical.
        m: base channels.

    Raises:
        EqualizationError: as `equalize_width`. ValueError: a network of fixed shape.
    """
    blocks, _ = models.shape_of(spec)
    return [with_factors(spec, factors, m=m) for factors in equalize_width(order, blocks).minimal]


def leanest(spec: Spec, order: Sequence[int | str], *, m: int = WIDTH, largest_last: int = LARGEST_LAST) -> Spec:
    """The equalized network with the fewest FLOPs whose last factor is at most `largest_last`: the paper's choice.

    It takes hrn-5x5x3x "as its FLOPs efficiency is superior" (section 5), and hrn34-4x6x3x for ResNet34, where without
    the bound on gamma 4x3x6x had fewer.

    Raises:
        EqualizationError: as `equalize_width`; or every equalized network has a larger last factor.
    """
    blocks, _ = models.shape_of(spec)
    found = [factors for factors in equalize_width(order, blocks).minimal if factors[-1] <= largest_last]
    if not found:
        raise EqualizationError(f"leanest: no equalized network has a last factor of at most {largest_last}")
    return with_factors(spec, min(found, key=lambda factors: sum(relative_flops(blocks, factors))), m=m)


def lowered(spec: Spec, alpha: int = ALPHA) -> Spec:
    """Step 2 of section 4.3: the same network with the first factor `alpha`, so that stage 1 has most of the ReLUs.

    Raises:
        ValueError: alpha is no int from 1 to 99, which is what a HybReNet's name can say.
    """
    if isinstance(alpha, bool) or not isinstance(alpha, int) or not 1 <= alpha <= 99:
        raise ValueError(f"lowered: alpha must be an int in 1..99 (got {alpha!r:.80})")
    return with_factors(spec, (alpha, *models.shape_of(spec)[1][1:]))


def deepened(spec: Spec, order: Sequence[int | str]) -> Spec:
    """The network equalized by depth (appendix D): its channel factors kept, the fewest blocks (`equalize_depth`)."""
    _, factors = models.shape_of(spec)
    result = {**spec, "blocks": equalize_depth(order, factors)}
    models.shapes_only(result)
    return result


def base_channels(spec: Spec, widths: Iterable[int] = WIDTHS) -> list[Spec]:
    """BaseCh: the network with other base channels m, all stages in proportion (Table 2, uniform channel scaling)."""
    made = [{**spec, "width": m} for m in widths]
    for one in made:
        models.shapes_only(one)
    return made


def stage_channels(spec: Spec, factors: Iterable[int] = FACTORS, *, m: int = WIDTH) -> list[Spec]:
    """StageCh: equal factors alpha = beta = gamma, base channels m (Table 2, homogeneous channel scaling)."""
    count = len(models.shape_of(spec)[1])
    return [with_factors(spec, (factor,) * count, m=m) for factor in factors]


def relative_flops(blocks: Sequence[int], factors: Sequence[int]) -> tuple[Fraction, ...]:
    """phi_k * (lambda_1 ... lambda_{k-1})**2 / 4**(k-1) of every stage: Table 15, in units of one block of stage 1."""
    return tuple(Fraction(count * math.prod(factors[:stage]) ** 2, SHRINK**stage) for stage, count in enumerate(blocks))
