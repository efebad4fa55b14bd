"""DeepReShape's pipeline (section 4.3, Algorithm 2): from a network and its order of criticality to specs and plans."""

from collections.abc import Iterable, Sequence

from deepshare import models
from deepshare.methods.deepreduce import cull, on, reshape, stage_relus, thin
from deepshare.methods.deepreshape import WIDTH, Spec, leanest, lowered
from deepshare.methods.equalization import checked_order
from deepshare.methods.relu_reuse import relu_reuse
from deepshare.methods.variant import Variant
from deepshare.plan import Plan
from deepshare.site import checked_image_size

REUSE = (4, 8, 16)  # Algorithm 2, lines 7 to 9
WIDTHS = (8, 16, 32)  # m of Tables 6 and 13


def algorithm2(
    spec: Spec,
    order: Sequence[int | str],
    input_size: Sequence[int],  # (C, H, W)
    *,
    cull_least: bool | None = None,
    factors: Iterable[int] = REUSE,
) -> list[Variant]:
    """The ReLU-optimized forms of one network, most ReLUs first (Algorithm 2).

    The network, its least critical stage culled if that stage has the most ReLUs; this thinned; the thinned one with
    half the channels; the thinned one with ReLU-reuse by each of `factors`, three groups, in every layer that keeps
    its ReLU. The stem's ReLU counts as stage 1's (Table 4), and goes with stage 1 or with thinning.

    Args:
        order: its stages from least to most critical.
        cull_least: whether the least critical stage is culled; by default as Algorithm 2 decides. True for ResNet34's
            2x6x3x, whose stage 1 Table 14 culls although its stage 3 has more ReLUs (147,456 to 114,688).

    Raises:
        ValueError: order is no permutation of the stages, the channels cannot be halved or split, or a stage cannot be
            thinned.
    """
    net, thinned, steps = _culled_and_thinned(spec, order, input_size, cull_least)
    half = reshape(spec, alpha=0.5)
    found = [net, thinned, named(half, on(half, thinned.plan), steps)]
    return [*found, *(reused(thinned, factor) for factor in factors)]


def reused(variant: Variant, factor: int) -> Variant:
    """The variant with ReLU-reuse by `factor` in every layer that keeps its ReLU; the spec rebuilds the network.

    Raises:
        PlanError: as `relu_reuse`.
    """
    made = relu_reuse(models.shapes_only(variant.spec), variant.plan, factor)
    return Variant(f"{variant.name}+Re2({factor})", {**variant.spec, "reuse": made.settings}, made.plan)


def pipeline(
    spec: Spec,
    order: Sequence[int | str],
    input_size: Sequence[int],  # (C, H, W)
    *,
    widths: Iterable[int] = WIDTHS,
    factors: Iterable[int] = REUSE,
) -> list[Variant]:
    """Networks over a wide range of ReLU counts, from one network and its order of criticality (section 4.3).

    Step 1, ReLU equalization, gives the leanest HybReNet (`deepreshape.leanest`); step 2 sets alpha to 2. At each width
    m the first is thinned and the second culled in stage 1 and thinned; at m = 16 the second also has ReLU-reuse. These
    are the rows of Tables 6, 13 and, for ResNet34, 14.

    Args:
        order: the network's stages from least to most critical; the networks made of it are taken to have the same.

    Returns:
        Most DReLUs first; no training decides anything.

    Raises:
        EqualizationError, ValueError: as `leanest` and `algorithm2`.
    """
    found = []
    for m in widths:
        equal = leanest(spec, order, m=m)
        found.append(_culled_and_thinned(equal, order, input_size, False)[1])
        found.append(_culled_and_thinned(lowered(equal), order, input_size, True)[1])
    _, culled, _ = _culled_and_thinned(lowered(leanest(spec, order, m=WIDTH)), order, input_size, True)
    found += [reused(culled, factor) for factor in factors]
    return sorted(found, key=lambda variant: -variant.plan.drelus)


def thinned_plan(spec: Spec, plan: Plan, stages: Sequence[str]) -> Plan:
    """The plan thinned in `stages`, the stem's ReLU dropped: Tables 6, 13, 14 and appendix F count none.

    Raises:
        PlanError: as `deepreduce.thin`.
    """
    return thin(spec, cull(spec, plan, _stem(spec, plan)), stages)


def named(spec: Spec, plan: Plan, steps: str) -> Variant:
    """A variant under the paper's name for it: the network, m, what was culled (C), thinned (RT), reused (Re2)."""
    shape = "".join(f" {key} {'-'.join(map(str, spec[key]))}" for key in ("multipliers", "blocks") if spec.get(key))
    return Variant(f"{spec['name']}{shape} m={models.width_of(spec)} {steps}".strip(), dict(spec), plan)


def _culled_and_thinned(
    spec: Spec, order: Sequence[int | str], input_size: Sequence[int], cull_least: bool | None
) -> tuple[Variant, Variant, str]:
    """The network, culled if it is to be; that thinned; and the paper's word for both steps (Algorithm 2, 1 to 5)."""
    least, *others = (f"S{number}" for number in checked_order("algorithm2", order, len(models.shape_of(spec)[0])))
    full = Plan.of(models.shapes_only(spec), checked_image_size("algorithm2", input_size))
    if _dominates(spec, full, least) if cull_least is None else cull_least:
        net = cull(spec, full, [least, *_stem(spec, full)] if least == "S1" else [least])
        label, steps, stages = f"C{least[1:]}", f"C{least[1:]}+RT", others
    else:
        net, label, steps, stages = full, "", "RT", [least, *others]
    return named(spec, net, label), named(spec, thinned_plan(spec, net, stages), steps), steps


def _dominates(spec: Spec, full: Plan, stage: str) -> bool:
    """Whether the stage has more ReLUs than any other ("the highest fraction", ICLR version), the stem with stage 1."""
    counts = stage_relus(spec, full)
    counts["S1"] += counts.pop(models.STEM, 0)
    return all(counts[stage] > count for other, count in counts.items() if other != stage)


def _stem(spec: Spec, plan: Plan) -> list[str]:
    return [models.STEM] if models.STEM in stage_relus(spec, plan) else []
