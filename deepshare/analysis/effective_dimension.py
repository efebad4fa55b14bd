"""How many dimensions the ReLU gates of a layer have, across its channels (DeepShare, section 3.1 and Fig. 2)."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deepshare.find import find_calls, without_weights
from deepshare.site import PlanError, Site

SUMS_AT_ONCE = 2**30  # bytes of running sums; more sites than fit are taken in further passes over the images
MOST_IMAGES = 2**24  # up to here float32 sums of zeros and ones are exact


@dataclass(frozen=True, eq=False)
class GateDimensions:
    """The effective dimension of one site's gates at every position, divided by its channels: in 0..1.

    Attributes:
        site: its name; channels: C.
        real: float64 [H*W], at corresponding positions.
        shuffled: float64 [H*W], after every channel of every image was permuted by itself.
    """

    site: str
    channels: int
    real: Tensor
    shuffled: Tensor

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, to 4 digits after the point; what a result keeps under the site's name."""
        real, shuffled = ([round(float(value), 4) for value in values] for values in (self.real, self.shuffled))
        return {"channels": self.channels, "real": real, "shuffled": shuffled}


def gate_dimensions(
    model: nn.Module,
    images: Tensor,  # [N, C, H, W], normalised, on the model's device
    *,
    batch_size: int = 128,
    seed: int = 0,
) -> tuple[GateDimensions, ...]:
    """Effective dimension of the gates of every ReLU site in call order, real and shuffled; `model` in eval mode.

        gates of position p: 0/1 vectors over the channels, one an image; S their covariance, l_i its eigenvalues
        ED = (sum_i l_i)^2 / sum_i l_i^2 = tr(S)^2 / |S|_F^2        here divided by C

    The sum of a symmetric matrix's eigenvalues is its trace, and that of their squares tr(S S) = |S|_F^2: no
    eigenvalue need be found. A channel whose gate never changes adds nothing to either. Where no gate changes in any
    image, ED is 0/0; it is 0 here: the gates span nothing.

    Shuffled: the positions of each channel of each image are permuted by themselves ("within each channel"; the paper
    does not say whether images have permutations of their own). With few images both are too small by sampling noise,
    at most by the factor 1 + ED / N; the paper has N = 4,096.

    Args:
        model: its ReLUs are modules; functional ones are seen by no hook. It is not changed.
        batch_size: images at once. A pass keeps 8 bytes for each of H*W*C*C at every site it sums.
        seed: of the permutations.

    Raises:
        PlanError: no ReLU site, a functional one, or features that are no channels. ValueError: images are not
            [N, C, H, W] with N in 2..2^24.
    """
    if images.dim() != 4 or not 2 <= len(images) <= MOST_IMAGES:
        raise ValueError(f"gate_dimensions: images must be [N, C, H, W], N in 2..2^24 (got {list(images.shape)})")
    sites = _relu_sites(model, tuple(images.shape[1:]))
    probe = without_weights(model).eval()
    found: list[GateDimensions] = []
    for group in _groups(sites):
        sums = {site.name: _Sums(site, seed + 1000 * sites.index(site), images.device) for site in group}
        _run(probe, images, batch_size, sums)
        found += [one.dimensions(len(images)) for one in sums.values()]
    return tuple(found)


def _relu_sites(model: nn.Module, size: tuple[int, ...]) -> list[Site]:
    calls = [call for call in find_calls(model, size) if call.site.kind == "relu"]
    if not calls:
        raise PlanError("gate_dimensions: the model has no ReLU")
    for call in calls:
        if call.module is None:
            raise PlanError(f"gate_dimensions: site {call.site.name!r} is a functional ReLU; it must be an nn.ReLU")
        if call.features_last:
            raise PlanError(f"gate_dimensions: site {call.site.name!r} has features behind positions, not channels")
    return [call.site for call in calls]


def _groups(sites: Sequence[Site]) -> list[list[Site]]:
    """Sites in order, as many together as have their sums in SUMS_AT_ONCE bytes, at least one."""
    groups: list[list[Site]] = [[]]
    room = SUMS_AT_ONCE
    for site in sites:
        need = 8 * site.positions * site.channels**2
        if groups[-1] and need > room:
            groups.append([])
            room = SUMS_AT_ONCE
        groups[-1].append(site)
        room -= need
    return groups


class _Sums:
    """Of one site: how often two channels' gates are both open, [H*W, C, C], real and shuffled.

    The diagonal is how often each is open, so these are all the sums a covariance needs; exact, being integers.
    """

    def __init__(self, site: Site, seed: int, device: torch.device) -> None:
        self._site = site
        shape = (site.positions, site.channels, site.channels)
        self._real, self._shuffled = (torch.zeros(shape, device=device) for _ in range(2))
        self._generator = torch.Generator(device).manual_seed(seed)

    def add(self, x: Tensor) -> None:  # [B, C, *S], pre-activations
        gates = (x >= 0).float().reshape(*x.shape[:2], -1)
        keys = torch.rand(gates.shape, generator=self._generator, device=gates.device)
        for sums, values in ((self._real, gates), (self._shuffled, gates.gather(2, keys.argsort(2)))):
            vectors = values.permute(2, 1, 0)  # [H*W, C, B]
            sums.baddbmm_(vectors, vectors.mT)

    def dimensions(self, images: int) -> GateDimensions:
        real, shuffled = (normalised_dimension(sums, images).cpu() for sums in (self._real, self._shuffled))
        return GateDimensions(self._site.name, self._site.channels, real, shuffled)


def normalised_dimension(
    both_open: Tensor,  # [L, C, C], in how many of the images the gates of two channels are both 1
    images: int,
) -> Tensor:  # float64 [L]
    """tr(S)^2 / |S|_F^2 / C of the covariance S = both_open / N - m m^T, m the diagonal over N; 0 where S is 0."""
    share = both_open.double() / images
    mean = share.diagonal(dim1=1, dim2=2)
    square = (share - mean.unsqueeze(2) * mean.unsqueeze(1)).square().sum((1, 2))
    trace = (mean * (1 - mean)).sum(1)
    return torch.where(trace > 0, trace.square() / square / mean.shape[1], 0.0)


def _run(model: nn.Module, images: Tensor, batch_size: int, sums: dict[str, _Sums]) -> None:
    """Every image through `model`, what its ReLUs get into `sums`."""
    calls: Counter[str] = Counter()
    hooks = [
        module.register_forward_pre_hook(_watch(path, calls, sums))
        for path, module in model.named_modules()
        if isinstance(module, nn.ReLU)
    ]
    try:
        with torch.no_grad():
            for batch in images.split(batch_size):
                calls.clear()
                model(batch)
    finally:
        for hook in hooks:
            hook.remove()


def _watch(path: str, calls: Counter[str], sums: dict[str, _Sums]) -> Any:
    """A hook that adds a call's input to its site's sums: `path`, `path@2` for the second call (docs/plan.md)."""

    def enter(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        calls[path] += 1
        name = path if calls[path] == 1 else f"{path}@{calls[path]}"
        if name in sums:
            sums[name].add(arguments[0])

    return enter
