"""ReLU thinning before SNL (DeepReShape, section 3.3): the plan SNL starts from, and its budget."""

import pytest

from deepshare.methods.deepreshape import hybrid
from deepshare.methods.snl import SNLSettings
from deepshare.methods.thin_then_snl import thin_then_snl

CIFAR = (3, 32, 32)
RESNET18 = {"name": "resnet18", "num_classes": 100, "stem_relu": True, "in_channels": 3}


def test_thinning_before_snl_halves_what_snl_searches():
    """Appendix F: of HRN-5x7x2x SNL keeps 50K of 181.25K ReLUs and drops 131.25K."""
    made = thin_then_snl(hybrid("hrn-5x7x2x"), CIFAR, 50_000)
    assert made.variant.plan.drelus == 181_248
    assert made.budget == 50_000
    assert made.settings == SNLSettings()
    assert {site.kind for site in made.variant.plan if site.name.endswith("relu1")} == {"linear"}
    channel = thin_then_snl(RESNET18, CIFAR, 15_000, settings=SNLSettings(granularity="channel"))
    assert channel.settings.granularity == "channel"
    assert channel.variant.plan.drelus == 245_760
    with pytest.raises(ValueError, match="below the 181,248 ReLUs"):
        thin_then_snl(hybrid("hrn-5x7x2x"), CIFAR, 181_248)
