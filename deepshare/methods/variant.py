"""What a method that makes several networks returns for each of them, and the one of them for a budget."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from deepshare.budget import BudgetError
from deepshare.plan import Plan


class Variant(NamedTuple):
    """One network of a method: a readable name, the model spec (`models.create(**spec)`) and the plan for it."""

    name: str
    spec: dict[str, Any]
    plan: Plan


def for_budget(variants: Sequence[Variant], budget: int) -> Variant:
    """The variant with the most DReLUs not above `budget`; of equal ones the first.

    Counts of such networks are few and fixed ("achieving a specific target is challenging", DeepReShape, section 7);
    `methods.snl` and `thin_then_snl` end exactly at a budget.

    Raises:
        BudgetError: every variant is above; the message has the smallest. Or budget is no int.
    """
    if isinstance(budget, bool) or not isinstance(budget, int):
        raise BudgetError(f"for_budget: budget must be an int (got {budget!r:.80})")
    fitting = [variant for variant in variants if variant.plan.drelus <= budget]
    if not fitting:
        least = min((variant.plan.drelus, variant.name) for variant in variants) if variants else (0, "no variant")
        raise BudgetError(f"for_budget: budget must be at least {least[0]:,}, that of {least[1]} (got {budget!r})")
    return max(fitting, key=lambda variant: variant.plan.drelus)
