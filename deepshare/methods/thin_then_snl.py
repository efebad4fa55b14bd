"""Thinning before SNL (DeepReShape, section 3.3): alternate layers lose their ReLUs, SNL chooses among the rest."""

from collections.abc import Sequence
from typing import NamedTuple

from deepshare import models
from deepshare.methods.deepreshape import Spec
from deepshare.methods.deepreshape_pipeline import named, thinned_plan
from deepshare.methods.snl import SNLSettings, check_budget
from deepshare.methods.variant import Variant
from deepshare.plan import Plan
from deepshare.site import checked_image_size


class ThenSNL(NamedTuple):
    """What `thin_then_snl` returns: the thinned network to train first, then SNL's budget and settings on it."""

    variant: Variant
    budget: int
    settings: SNLSettings


def thin_then_snl(
    spec: Spec,
    input_size: Sequence[int],  # (C, H, W)
    budget: int,
    *,
    settings: SNLSettings | None = None,
) -> ThenSNL:
    """ReLU thinning before SNL (section 3.3, Table 5): alternate layers lose their ReLUs, SNL searches among the rest.

    The variant's plan is the one SNL starts from: its linear sites stay linear, its ReLUs get masks. HRN-5x7x2x leaves
    SNL 181,248 ReLUs to choose 50,000 from (appendix F).

    Raises:
        ValueError: the network cannot be thinned, or the budget is not below the thinned network's ReLUs.
    """
    full = Plan.of(models.shapes_only(spec), checked_image_size("thin_then_snl", input_size))
    variant = named(spec, thinned_plan(spec, full, models.stage_names(spec)), "RT")
    chosen = settings or SNLSettings()
    check_budget(variant.plan, budget, chosen.granularity)
    return ThenSNL(variant, budget, chosen)
