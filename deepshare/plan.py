"""The plan of a network: what stands at every activation site. Every other part makes, reads or applies it."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from deepshare.files import write_whole
from deepshare.find import Call, find_calls
from deepshare.graph import rewrite
from deepshare.site import MAX_IMAGE, Kind, Mask, PlanError, Site, checked_image_size
from deepshare.text_table import aligned

__all__ = ["Count", "Kind", "Mask", "Plan", "PlanError", "Site", "apply_plan", "count_drelus", "parse_input_size"]

VERSION = 1


@dataclass(frozen=True)
class Count:
    """DReLUs per image: in total, and by site name in call order."""

    total: int
    per_site: dict[str, int]


@dataclass(frozen=True)
class Plan:
    """The activation sites of one forward pass in call order, for images of `input_size` (C, H, W).

    Raises:
        PlanError: two sites have one name, or a leader is not an earlier shared site of equal shape with prototypes.
    """

    sites: tuple[Site, ...]
    input_size: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "sites", tuple(self.sites))
        object.__setattr__(self, "input_size", checked_image_size("Plan", self.input_size))
        earlier: dict[str, Site] = {}
        for site in self.sites:
            if not isinstance(site, Site):
                raise PlanError(f"Plan: sites must be Site values (got {type(site).__name__})")
            if site.name in earlier:
                raise PlanError(f"site {site.name!r}: the name stands twice in the plan")
            if site.leader is not None:
                _check_leader(site, earlier)
            earlier[site.name] = site

    @classmethod
    def of(cls, model: nn.Module, input_size: tuple[int, ...]) -> "Plan":
        """What stands in `model` now; `find.find_calls` says what is a site. The model is not changed.

        Raises:
            PlanError: as `find_calls`.
        """
        size = checked_image_size("Plan.of", input_size)
        return cls(tuple(call.site for call in find_calls(model, size)), size)

    def __iter__(self) -> Iterator[Site]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    def __getitem__(self, name: str) -> Site:
        for site in self.sites:
            if site.name == name:
                return site
        raise PlanError(f"Plan: no site {name!r}; sites are {', '.join(site.name for site in self.sites) or 'none'}")

    @property
    def drelus(self) -> int:
        """DReLUs per image."""
        return sum(site.drelus for site in self.sites)

    def replace(
        self,
        name: str,
        kind: Kind,
        *,
        prototypes: int | None = None,
        leader: str | None = None,
        mask: Mask | Tensor | None = None,  # bool [C, H, W] or [C]
        zero_out: bool = False,
    ) -> "Plan":
        """The plan with another activation at one site. Raises PlanError for an unknown site or a wrong result."""
        old = self[name]
        packed = Mask.of(mask) if isinstance(mask, Tensor) else mask
        new = Site(name, old.shape, kind, prototypes, leader, packed, zero_out)
        return Plan(tuple(new if site is old else site for site in self.sites), self.input_size)

    def replace_all(self, kind: Kind) -> "Plan":
        """The plan with "relu", "gelu" (the teacher's) or "linear" at every site."""
        return Plan(tuple(Site(site.name, site.shape, kind) for site in self.sites), self.input_size)

    def check_fits(self, model_plan: "Plan") -> None:
        """Raises PlanError naming the first difference to a `Plan.of`: image size, sites' names, order, shapes."""
        if self.input_size != model_plan.input_size:
            raise PlanError(f"the plan is for images of {self.input_size}, not {model_plan.input_size}")
        for ours, theirs in zip(self.sites, model_plan.sites, strict=False):
            if ours.name != theirs.name:
                raise PlanError(f"the plan has site {ours.name!r} where the model calls {theirs.name!r}")
            if ours.shape != theirs.shape:
                raise PlanError(f"site {ours.name!r}: the plan says shape {ours.shape}, the model has {theirs.shape}")
        if len(self) != len(model_plan):
            more, where = (self, "in the model") if len(self) > len(model_plan) else (model_plan, "in the plan")
            raise PlanError(f"site {more.sites[min(len(self), len(model_plan))].name!r} is missing {where}")

    def table(self) -> str:
        """One line per site (name, kind, shape, P or leader or kept elements, DReLUs), the total, what is counted."""
        rows: list[tuple[str, ...]] = [("site", "kind", "shape", "gates", "DReLUs"), ()]
        rows += [(s.name, s.kind, "x".join(map(str, s.shape)), _gates(s), f"{s.drelus:,}") for s in self.sites]
        rows += [(), ("total", "", "", "", f"{self.drelus:,}")]
        size = "x".join(map(str, self.input_size))
        note = f"Per image of {size}, by calls: relu, relu6 and gelu C*H*W, shared P*H*W, followers 0, mask its ones."
        if any(site.kind == "relu6" for site in self):
            note += "\nA relu6 is counted once, as published; its clip at 6 is a comparison more."
        return f"{aligned(rows, left=4)}\n{note}"

    def to_json(self) -> str:
        """Text that `from_json` turns into an equal plan."""
        fields = {"version": VERSION, "input_size": list(self.input_size)}
        return json.dumps({**fields, "sites": [site.to_dict() for site in self.sites]}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """Raises PlanError for text that is no plan, naming the site and field."""
        try:
            fields = json.loads(text)
        except (ValueError, RecursionError) as error:  # the latter for text nested a thousand deep
            raise PlanError(f"Plan: not JSON ({error})") from error
        if not isinstance(fields, dict) or "version" not in fields:
            raise PlanError("Plan: must be an object with version, input_size and sites")
        if fields["version"] != VERSION:
            raise PlanError(f"Plan: version must be {VERSION} (got {fields['version']!r})")
        if fields.keys() != {"version", "input_size", "sites"}:
            raise PlanError(f"Plan: fields must be version, input_size, sites (got {', '.join(fields)})")
        for name in ("input_size", "sites"):
            if not isinstance(fields[name], list):
                raise PlanError(f"Plan: {name} must be a list (got {fields[name]!r:.80})")
        return cls(tuple(Site.from_dict(site) for site in fields["sites"]), tuple(fields["input_size"]))

    def save(self, path: Path | str) -> Path:
        """Writes JSON to `path`, whole or not at all."""
        return write_whole(path, self.to_json() + "\n")

    @classmethod
    def load(cls, path: Path | str) -> "Plan":
        """Raises PlanError naming the file and what is wrong with it; OSError if it cannot be read."""
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except (PlanError, UnicodeDecodeError) as error:
            raise PlanError(f"{path}: {error}") from error


def _check_leader(site: Site, earlier: dict[str, Site]) -> None:
    leader = earlier.get(str(site.leader))
    if leader is None:
        raise PlanError(f"site {site.name!r}: leader {site.leader!r} must be an earlier site")
    if leader.prototypes is None:
        raise PlanError(f"site {site.name!r}: leader {leader.name!r} must have prototypes (got kind {leader.kind!r})")
    if leader.shape != site.shape:
        raise PlanError(f"site {site.name!r}: leader {leader.name!r} must have shape {site.shape} (got {leader.shape})")


def _gates(site: Site) -> str:
    if site.prototypes is not None:
        return f"P={site.prototypes}"
    if site.leader is not None:
        return f"of {site.leader}"
    if site.mask is not None:
        return f"{site.drelus:,} of {site.size:,}" + (", else 0" if site.zero_out else "")
    return {"relu": "all", "relu6": "all, clipped", "gelu": "all, soft", "linear": "none"}[site.kind]


def check_is_plan(here: str, plan: object) -> None:
    """Raises PlanError unless `plan` is a Plan: its path and its text are none (`Plan.load`, `Plan.from_json`)."""
    if not isinstance(plan, Plan):
        raise PlanError(f"{here}: plan must be a Plan (got {plan!r:.80})")


def apply_plan(model: nn.Module, plan: Plan) -> nn.Module:
    """A new model with the plan's activations at its sites; weights are copied, nothing is shared with `model`.

    What stands at a site as the plan says keeps its weights (a trained alpha and beta). All other weights keep their
    names: a state dict of `model` loads with strict=False and only activations' keys missing. Where layer sharing,
    functional ReLUs or modules called several times need it, the result is an fx.GraphModule (`graph.rewrite`): hooks
    and methods of the model's class are not carried over, and what forward decided from Python values stays decided.

    Raises:
        PlanError: the plan does not fit the model (the message names the first difference), or needs a traceable model.
    """
    check_is_plan("apply_plan", plan)
    calls: list[Call] = find_calls(model, plan.input_size)
    plan.check_fits(Plan(tuple(call.site for call in calls), plan.input_size))
    result = rewrite(model, calls, plan.sites, plan.input_size)
    for wanted, made in zip(plan.sites, Plan.of(result, plan.input_size).sites, strict=True):
        if wanted != made:
            raise PlanError(
                f"site {wanted.name!r}: {type(model).__name__} does not call the module registered there, it cannot be "
                f"replaced (wanted {wanted.kind}, {_gates(wanted)}; found {made.kind}, {_gates(made)})"
            )
    return result


def count_drelus(model_or_plan: nn.Module | Plan, input_size: tuple[int, ...] | None = None) -> Count:
    """DReLUs of one forward pass per image, exact: counted by calls, not by modules.

    Args:
        model_or_plan: a model, with whatever activations it has, or a plan.
        input_size: (C, H, W), for a model.

    Raises:
        PlanError: a model without input_size, or one that does not run on it; a plan for another size.
    """
    if isinstance(model_or_plan, Plan):
        plan = model_or_plan
        if input_size is not None and tuple(input_size) != plan.input_size:
            raise PlanError(
                f"count_drelus: the plan is for images of {plan.input_size} (got input_size {tuple(input_size)})"
            )
    elif input_size is None:
        raise PlanError("count_drelus: a model needs input_size, (C, H, W)")
    else:
        plan = Plan.of(model_or_plan, input_size)
    return Count(plan.drelus, {site.name: site.drelus for site in plan.sites})


def parse_input_size(text: str) -> tuple[int, ...]:
    """(C, H, W) from "3x32x32". Raises PlanError for anything else."""
    parts = text.lower().split("x")
    if len(parts) != 3 or not all(part.isascii() and part.isdigit() and part.strip("0") for part in parts):
        raise PlanError(f"input size must look like 3x32x32, channels x height x width (got {text!r:.80})")
    if any(len(part) > len(str(MAX_IMAGE)) for part in parts):  # int() refuses some thousands of digits
        raise PlanError(f"input size must be at most {MAX_IMAGE:,} values an image (got {text!r:.80})")
    return checked_image_size("input size", [int(part) for part in parts])
