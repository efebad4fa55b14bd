"""What a method that makes several networks returns for each of them."""

from typing import Any, NamedTuple

from deepshare.plan import Plan


class Variant(NamedTuple):
    """One network of a method: a readable name, the model spec (`models.create(**spec)`) and the plan for it."""

    name: str
    spec: dict[str, Any]
    plan: Plan
