"""Anybody's model with shared gates: find its activations, spread a budget over them, put the plan in."""

import warnings
from typing import Literal

from torch import nn

from deepshare.budget import Allocation, BudgetError, Weights, allocate
from deepshare.find import Call, find_calls, is_activation
from deepshare.plan import Plan, PlanError, apply_plan
from deepshare.site import checked_image_size


def convert(
    model: nn.Module,
    input_size: tuple[int, ...],  # (C, H, W)
    budget: int | None = None,
    method: Literal["deepshare"] = "deepshare",
    *,
    plan: Plan | None = None,
    weights: Weights = "uniform",
    group: int | Literal["auto"] = "auto",
    layer_sharing: bool | Literal["auto"] = "auto",
) -> nn.Module:
    """A copy of `model` that pays at most `budget` DReLUs per image: its activations share gates (DeepShare 3.2).

    Every ReLU, ReLU6 and GELU that a forward pass calls becomes a SharedReLU2d. All other weights are kept, under their
    names. The gates are hard, alpha 1 and beta 0: the result must be trained. With budget = the model's own count
    (P = C everywhere) a model of ReLUs computes what it did; of a ReLU6 the clip at 6 goes.

    `Plan.of(result, input_size)` is the plan that stands then. Other activations (Hardswish, Sigmoid) stay and are in
    no count, with a warning. docs/convert.md shows training, saving, loading.

    Args:
        model: any module that maps [N, *input_size] to something; it is not changed.
        input_size: of one image.
        budget: DReLUs per image, at most as many as the model has: an `Allocation` tells what it reached, a model does
            not, so that nothing but the budget may come out. Or else `plan`.
        method: "deepshare", the one method that needs no training to make a plan.
        plan: what shall stand at the sites instead, by any method: SNL's masks, culled or thinned layers, a saved plan.
        weights, group: as for `allocate`.
        layer_sharing: True, False, or "auto": gates go from layer to layer where torch.fx can trace the model; where
            it cannot, channels share alone, by module swap, with a warning that says why.

    Raises:
        PlanError: the model does not run on such an image, has no site or one whose channels are its last dimension
            (seen where it activates a linear layer), cannot be given the plan (torch.fx cannot trace it, and a swap of
            modules is not enough; the message says both), or the plan is another model's.
        BudgetError: the budget is below the floor (named) or above the model's DReLUs; or as `allocate`.
        ValueError: neither or both of budget and plan; an unknown method.
    """
    size = checked_image_size("convert", input_size)
    _check_request(model, budget, method, plan)
    calls = find_calls(model, size)
    found = Plan(tuple(call.site for call in calls), size)
    _check_has_sites(model, found)
    if plan is not None:
        if plan.input_size != size:
            raise PlanError(f"convert: the plan is for images of {plan.input_size} (got input_size {size})")
        return apply_plan(model, plan)
    assert budget is not None  # _check_request
    _check_channels(calls)
    _check_not_above(found, budget)
    if others := _other_activations(model):
        warnings.warn(f"convert: {others} stay as they are, and are in no count", stacklevel=2)
    allocation = allocate(found, weights, budget, group, layer_sharing=bool(layer_sharing))
    _warn_if_full(allocation)
    try:
        return apply_plan(model, allocation.plan)
    except PlanError as error:
        if allocation.group == 1 or (layer_sharing, group) != ("auto", "auto"):
            raise
        return _by_channels_alone(model, found, weights, budget, error)


def _check_request(model: object, budget: object, method: object, plan: object) -> None:
    if not isinstance(model, nn.Module):
        raise ValueError(f"convert: model must be an nn.Module (got {type(model).__name__})")
    if method != "deepshare":
        raise ValueError(
            f'convert: method must be "deepshare" (got {method!r:.80}); masks, culling and thinning are learned or '
            "chosen first: give the plan that deepshare.methods makes as plan="
        )
    if (budget is None) == (plan is None):
        raise ValueError(f"convert: wanted either budget or plan (got {'neither' if plan is None else 'both'})")
    if plan is not None and not isinstance(plan, Plan):
        raise ValueError(f"convert: plan must be a Plan (got {type(plan).__name__})")


def _check_has_sites(model: nn.Module, found: Plan) -> None:
    if len(found):
        return
    raise PlanError(
        f"convert: {type(model).__name__} calls no ReLU, ReLU6 or GELU module and no functional ReLU or ReLU6; "
        f"of other activation modules it has {_other_activations(model) or 'none'}: what shall share gates must be an "
        "nn.ReLU"
    )


def _check_channels(calls: list[Call]) -> None:
    for call in calls:
        if call.features_last:
            shape = ", ".join(map(str, call.site.shape))
            raise PlanError(
                f"convert: site {call.site.name!r} activates a linear layer over [N, {shape}], whose last dimension "
                "is the channel: gates are shared along dimension 1"
            )


def _other_activations(model: nn.Module) -> str:
    of_torch = (module for module in model.modules() if type(module).__module__ == "torch.nn.modules.activation")
    return ", ".join(sorted({type(module).__name__ for module in of_torch if not is_activation(module)}))


def _check_not_above(found: Plan, budget: object) -> None:
    most = sum(site.size for site in found if site.kind != "linear")
    if isinstance(budget, int) and budget > most:
        raise BudgetError(f"convert: budget must be at most the {most:,} ReLUs of the model (got {budget:,})")


def _warn_if_full(allocation: Allocation) -> None:
    """Where a group length was asked for, its leaders may be full long before the budget is spent."""
    leaders = [site for site in allocation.plan if site.prototypes is not None]
    full = all(site.prototypes == site.channels for site in leaders)
    if full and allocation.reached < allocation.requested:
        warnings.warn(
            f"convert: layer groups of up to {allocation.group} sites can spend no more than {allocation.reached:,} of "
            f"{allocation.requested:,} DReLUs",
            stacklevel=3,
        )


def _by_channels_alone(model: nn.Module, found: Plan, weights: Weights, budget: int, error: PlanError) -> nn.Module:
    """Where gates cannot go from layer to layer (`error`), every site leads itself."""
    try:
        result = apply_plan(model, allocate(found, weights, budget, layer_sharing=False).plan)
    except BudgetError as floor:
        raise BudgetError(f"convert: no layer sharing ({error}); without it: {floor}") from error
    except PlanError as swap:
        if str(swap) == str(error):
            raise
        raise PlanError(f"convert: no layer sharing ({error}); without it: {swap}") from error
    warnings.warn(f"convert: channels share gates, layers do not: {error}", stacklevel=3)
    return result
