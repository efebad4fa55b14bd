"""DeepReDuce (Jha et al., ICML 2021): ReLUs dropped by stages, then in alternate layers, then by a smaller network.

Which stages matter is measured (`deepshare.compare.criticality` trains the networks); everything here is arithmetic on
plans and model specs.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from deepshare.methods.variant import Variant
from deepshare.models import STEM, shape_of, shapes_only, stage_names, stage_of, width_of
from deepshare.models.families import check_is_spec
from deepshare.plan import Plan, check_is_plan
from deepshare.site import PlanError, checked_image_size

Network = nn.Module | Mapping[str, Any]  # a model of models.create, or its spec
RESHAPINGS = ((0.5, 1.0), (1.0, 0.5), (0.5, 0.5))  # (alpha, rho): 2x, 4x, 8x fewer ReLUs (section 3.3)


def criticality(accuracies: Mapping[str, float], relus: Mapping[str, int], w: float = 0.07) -> dict[str, float]:
    """C_k of every stage: the accuracy its ReLUs alone buy, over what they cost (DeepReDuce, equation 1).

        C_k = (Acc[S_k] - min_i Acc[S_i]) / #ReLU[S_k] ** w

    in percent of accuracy over thousands of ReLUs, the units that give the paper's figures.

    Args:
        accuracies: by stage, of the network with ReLUs only there, trained with distillation; shares in [0, 1].
        relus: by stage, how many ReLUs it has.
        w: what ReLUs cost against accuracy; the paper's value.

    Raises:
        ValueError: no stages, other stages in `relus`, an accuracy outside [0, 1], a count below 1, w below 0.
    """
    if not accuracies or accuracies.keys() != relus.keys():
        raise ValueError(f"criticality: relus must have the stages {_listed(accuracies)} (got {_listed(relus)})")
    for stage, share in accuracies.items():
        if not 0 <= share <= 1:
            raise ValueError(f"criticality: accuracies must be shares in [0, 1] (got {share!r} for {stage})")
        if not relus[stage] >= 1:
            raise ValueError(f"criticality: relus must be at least 1 (got {relus[stage]!r} for {stage})")
    if not 0 <= w < math.inf:
        raise ValueError(f"criticality: w must be a number from 0 (got {w!r})")
    least = min(accuracies.values())
    return {stage: 100 * (share - least) / (relus[stage] / 1000) ** w for stage, share in accuracies.items()}


def culling_order(critical: Mapping[str, float]) -> tuple[str, ...]:
    """Stages from least to most critical. Equal ones in the order given: the earlier stage has more ReLUs to drop."""
    return tuple(sorted(critical, key=lambda stage: critical[stage]))


def stage_relus(network: Network, plan: Plan) -> dict[str, int]:
    """DReLUs of each stage that has sites, in call order: "conv1" (the stem), "S1", ...

    Raises:
        PlanError: a site of no stage of `network`.
    """
    counts: dict[str, int] = {}
    for site in plan:
        stage = stage_of(network, site.name)
        counts[stage] = counts.get(stage, 0) + site.drelus
    return counts


def cull(network: Network, plan: Plan, stages: Iterable[str]) -> Plan:
    """The plan without any ReLU in `stages` (ReLU culling, section 3.1).

    Args:
        network: whose plan it is: a model of models.create, or its spec.
        plan: of any activations.
        stages: names as "S1"; "conv1" is the stem.

    Raises:
        PlanError: the network has no such stage, or the plan no site there.
    """
    chosen = _chosen("cull", network, plan, stages)
    return _without(plan, [name for names in chosen.values() for name in names])


def keep_only(network: Network, plan: Plan, stages: Iterable[str]) -> Plan:
    """The plan with every ReLU outside of `stages` dropped: the networks whose accuracies are equation 1's.

    Raises:
        PlanError: as `cull`.
    """
    kept = {name for names in _chosen("keep_only", network, plan, stages).values() for name in names}
    return _without(plan, [site.name for site in plan if site.name not in kept])


def thin(network: Network, plan: Plan, stages: Iterable[str]) -> Plan:
    """The plan without the first, third, ... remaining activation of each of `stages` (ReLU thinning, section 3.2).

    In a residual block of two layers that is the ReLU between its convolutions; the one behind the addition stays.
    A stage of an odd number keeps the smaller half.

    Args:
        network, stages: as `cull`'s.

    Raises:
        PlanError: as `cull`; or a stage has fewer than two activations left: nothing would remain.
    """
    dropped = []
    for stage, names in _chosen("thin", network, plan, stages).items():
        left = [name for name in names if plan[name].kind != "linear"]
        if len(left) < 2:
            raise PlanError(f"thin: stage {stage} must have at least 2 activations left (got {len(left)})")
        dropped += left[::2]
    return _without(plan, dropped)


def reshape(spec: Mapping[str, Any], *, alpha: float = 1.0, rho: float = 1.0) -> dict[str, Any]:
    """The spec with alpha times the channels and rho times the height and width of every feature map (section 3.3).

    That is alpha * rho**2 times the ReLUs.

    Raises:
        ValueError: alpha leaves no whole number of channels; what models.create refuses (rho other than 1 and 0.5).
    """
    width = width_of(spec)
    for name, value in (("alpha", alpha), ("rho", rho)):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"reshape: {name} must be a number (got {value!r:.80})")
    scaled = width * alpha
    if not scaled >= 1 or scaled != int(scaled):
        raise ValueError(f"reshape: alpha must leave a whole number of the {width} channels (got {alpha!r})")
    new = {**spec, "width": int(scaled), "rho": spec.get("rho", 1.0) * rho}
    shapes_only(new)
    return new


def one_block(spec: Mapping[str, Any], stages: Iterable[str]) -> dict[str, Any]:
    """The spec with a single residual block in `stages`: the rows marked * of Tables 4 and 5.

    Raises:
        ValueError: a network whose number of blocks is fixed, or a stage it does not have.
    """
    blocks, _ = shape_of(spec)
    wanted, known = set(_stage_list("one_block: stages", stages)), stage_names(spec)
    if not wanted <= set(known):
        raise ValueError(f"one_block: stages must be of {_listed(known)} (got {_listed(sorted(wanted))})")
    return {
        **spec,
        "blocks": tuple(1 if stage in wanted else count for stage, count in zip(known, blocks, strict=True)),
    }


def pipeline(
    spec: Mapping[str, Any],
    order: Sequence[str],
    input_size: Sequence[int] | None = None,  # (C, H, W)
) -> list[Variant]:
    """Every network DeepReDuce makes of one: five for each number of culled stages (section 3.5, Figure 4).

    For k = 1 ... D - 1 the k least critical stages are culled: that network, the same thinned, and the thinned one with
    half the channels, with half the feature maps' sides, with both. The stem's ReLUs are dropped in all of them
    (section 2.2). A head's own ReLUs ("fc", of which the paper's networks have none) stay.

    Args:
        spec: of the baseline, which is also the teacher of all of them.
        order: its stages from least to most critical, as `culling_order`.
        input_size: of the images; by default the spec's.

    Returns:
        5 * (D - 1) variants, named as the paper writes them ("S2RT+S3RT a=0.5 r=0.5"); specs for models.create.

    Raises:
        PlanError: order is no permutation of the network's stages, or there is no input size.
    """
    check_is_spec("pipeline", spec)
    size = input_size if input_size is not None else spec.get("input_size")
    if size is None:
        raise PlanError("pipeline: input_size must be given, (C, H, W), where the spec has none")
    base = {key: value for key, value in spec.items() if key != "input_size"}
    full = Plan.of(shapes_only(base), checked_image_size("pipeline", size))
    stages = stage_names(base)
    order = _stage_list("pipeline: order", order)
    if sorted(order) != sorted(stages) or len(stages) < 2:
        raise PlanError(f"pipeline: order must be a permutation of {_listed(stages)} (got {_listed(order)})")
    found: list[Variant] = []
    for count in range(1, len(order)):
        kept = sorted(order[count:], key=stages.index)
        found += _iteration(base, full, kept)
    return found


def on(spec: Mapping[str, Any], plan: Plan) -> Plan:
    """The plan's ReLUs and linear sites on another shape of its network; sites that network lacks are left out.

    Raises:
        PlanError: the network has a site the plan does not name, or the plan holds more than ReLUs and linear sites.
    """
    check_is_plan("on", plan)
    known = {site.name: site.kind for site in plan}
    new = Plan.of(shapes_only(spec), plan.input_size)
    for site in new:
        kind = known.get(site.name)
        if kind not in ("linear", site.kind):
            raise PlanError(f"on: site {site.name!r} must be {site.kind} or linear in the plan (got {kind})")
    return _without(new, [site.name for site in new if known[site.name] == "linear"])


def _iteration(spec: dict[str, Any], full: Plan, kept: Sequence[str]) -> list[Variant]:
    """The five networks with ReLUs in `kept`: culled, thinned, thinned and reshaped three ways."""
    culled = keep_only(spec, full, [*kept, *_head(spec, full)])
    thinned = thin(spec, culled, kept)
    found = [Variant("+".join(kept), spec, culled), Variant("+".join(f"{stage}RT" for stage in kept), spec, thinned)]
    for alpha, rho in RESHAPINGS:
        name = found[1].name + (f" a={alpha:g}" if alpha != 1 else "") + (f" r={rho:g}" if rho != 1 else "")
        reshaped = reshape(spec, alpha=alpha, rho=rho)
        found.append(Variant(name, reshaped, on(reshaped, thinned)))
    return found


def _head(network: Network, plan: Plan) -> list[str]:
    return [stage for stage in stage_relus(network, plan) if stage not in (STEM, *stage_names(network))]


def _chosen(here: str, network: Network, plan: Plan, stages: Iterable[str]) -> dict[str, list[str]]:
    """Names of the sites of each of `stages`, in call order."""
    check_is_plan(here, plan)
    found: dict[str, list[str]] = {}
    for site in plan:
        found.setdefault(stage_of(network, site.name), []).append(site.name)
    wanted = _stage_list(f"{here}: stages", stages)
    for stage in wanted:
        if stage not in found:
            raise PlanError(f"{here}: stages must be of {_listed(found)} (got {stage!r})")
    return {stage: found[stage] for stage in wanted}


def _stage_list(here: str, stages: Any) -> list[str]:
    """Names of stages, one alone too. Raises PlanError: something else."""
    found: list[Any] = (
        [stages] if isinstance(stages, str) else list(stages) if isinstance(stages, Iterable) else [stages]
    )
    for stage in found:
        if not isinstance(stage, str):
            raise PlanError(f"{here} must be names such as 'S1' (got {stages!r:.80})")
    return found


def _without(plan: Plan, names: Iterable[str]) -> Plan:
    for name in names:
        plan = plan.replace(name, "linear")
    return plan


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"
