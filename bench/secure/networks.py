"""The networks of DeepShare's Table 6, without training: a latency does not depend on what the weights are."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deepshare import models
from deepshare.analysis.published_latency import published_speedups
from deepshare.budget import allocate
from deepshare.plan import Plan, apply_plan

SEED = 6
CALIBRATION = 8  # images through batch norms in training mode: activations get the size that a trained network's have


@dataclass(frozen=True)
class Family:
    """One all-ReLU network and the published list of ReLUs per layer its budgets are spread by.

    The paper takes them from an SNL run. These lists are SENet's, for the same network, at the nearest label there is.
    """

    model: str
    classes: int
    side: int
    fractions: str


FAMILIES = {
    ("CIFAR-100", "ResNet18"): Family("resnet18", 100, 32, "ResNet18_c100_relu50k"),
    ("CIFAR-100", "WRN-22-8"): Family("wrn-22-8", 100, 32, "WRN22_8_C100_relu240k"),
    ("Tiny-ImageNet", "ResNet18"): Family("resnet18", 200, 64, "ResNet18_tiny_imagenet_relu150k"),
}


@dataclass(frozen=True)
class Network:
    """A row of the table, or (relus_k None) the all-ReLU model its latency is divided by."""

    dataset: str
    network: str
    relus_k: float | None
    published: float | None = None  # times faster, DeepShare's column

    @property
    def family(self) -> Family:
        return FAMILIES[self.dataset, self.network]

    @property
    def name(self) -> str:
        budget = "all ReLUs" if self.relus_k is None else f"{self.relus_k:g}K"
        return f"{self.network}/{self.dataset} {budget}"

    @property
    def slug(self) -> str:
        budget = "all" if self.relus_k is None else f"{self.relus_k:g}k"
        return f"{self.family.model}-{self.family.side}-{budget}"

    def all_relu(self) -> "Network":
        return Network(self.dataset, self.network, None)

    def build(self) -> tuple[nn.Module, int, str]:
        """(model in eval mode, its DReLUs an image, its plan in words), the same on every call. No stem ReLU."""
        torch.manual_seed(SEED)
        family = self.family
        model = models.create(family.model, num_classes=family.classes, stem_relu=False)
        plan = Plan.of(model, (3, family.side, family.side))
        words = "a ReLU an element"
        if self.relus_k is not None:
            found = allocate(plan, family.fractions, round(self.relus_k * 1000))
            plan, words = found.plan, str(found)
            model = apply_plan(model, plan)
        return _calibrated(model, family.side), plan.drelus, words

    def images(self, count: int) -> Tensor:
        """[count, 3, side, side], of unit variance as normalised images are."""
        generator = torch.Generator().manual_seed(SEED + 1)
        return torch.randn(count, 3, self.family.side, self.family.side, generator=generator)


def networks() -> list[Network]:
    """Each family's all-ReLU model, then its budgets, in the paper's order."""
    found: dict[Network, None] = {}
    for row in published_speedups():
        found[Network(row.dataset, row.network, None)] = None
        found[Network(row.dataset, row.network, row.relus_k, row.deepshare)] = None
    return list(found)


def _calibrated(model: nn.Module, side: int) -> nn.Module:
    """Batch norms take their statistics from one batch, as training would leave them."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    model.train()
    with torch.no_grad():
        model(torch.randn(CALIBRATION, 3, side, side, generator=torch.Generator().manual_seed(SEED + 2)))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model.eval()
