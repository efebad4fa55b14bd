"""Models by name: what recipes, checkpoints and the command line say instead of a class."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from deepshare.models.families import PATTERNS, PUBLISHED, Family, check_is_spec, family_of
from deepshare.models.reuse import with_reuse
from deepshare.plan import Plan, PlanError
from deepshare.site import checked_image_size

MAX_WIDTH = 4096  # 64 times the papers'
_MOST = {"num_classes": 2**20, "width": MAX_WIDTH, "in_channels": 2**16}  # far above any paper's; beyond it a mistake
_MOST_CHANNELS = 2**18  # of one stage
_MOST_BLOCKS = 256  # per stage
_MOST_MULTIPLIER = 64
RHOS = (1.0, 0.5)


def names() -> tuple[str, ...]:
    """The networks of the papers' tables. `create` knows more: every wrn-D-K, hrn-AxBxCx and hrn34-AxBxCx."""
    return PUBLISHED


def patterns() -> tuple[str, ...]:
    """How the names look of which there is no list."""
    return PATTERNS


def is_name(name: str) -> bool:
    """Whether `create` knows `name`."""
    return family_of(name) is not None


def default_width(name: str) -> int:
    """Channels of the first convolution as published. Raises ValueError for an unknown name."""
    return _family(name).width


def width_of(spec: Mapping[str, Any]) -> int:
    """Channels of the first convolution: the spec's, or as published. Raises ValueError for an unknown name."""
    check_is_spec("models.width_of", spec)
    channels = spec.get("channels")
    first = channels[0] if isinstance(channels, list | tuple) and channels else None
    return spec.get("width") or first or default_width(str(spec.get("name")))


def shape_of(spec: Mapping[str, Any]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(blocks per stage, channel factors from stage to stage) of a spec. Raises ValueError where they are fixed, or
    where the spec has channels of each stage."""
    check_is_spec("models.shape_of", spec)
    name = spec["name"]
    family = family_of(name) if isinstance(name, str) else None
    if family is None or family.blocks is None or family.multipliers is None:
        raise ValueError(f"models.shape_of: the network must be a ResNet, WideResNet or HybReNet (got {name!r:.80})")
    if spec.get("channels"):
        raise ValueError(f"models.shape_of: the network must have factors (got channels {tuple(spec['channels'])})")
    return tuple(spec.get("blocks") or family.blocks), tuple(spec.get("multipliers") or family.multipliers)


def create(
    name: str,
    *,
    num_classes: int,
    width: int | None = None,
    stem_relu: bool = False,
    in_channels: int = 3,
    multipliers: Sequence[int] | None = None,
    blocks: Sequence[int] | None = None,
    rho: float = 1.0,
    reuse: Mapping[str, Any] | None = None,
    channels: Sequence[int] | None = None,
) -> nn.Module:
    """A freshly initialised model, every activation an nn.ReLU.

    Args:
        name: one of `names()`, or any wrn-D-K (depth D = 6n + 4, factor K), hrn-AxBxCx (HybReNet of DeepReShape with
            ResNet18's blocks), hrn34-AxBxCx (with ResNet34's).
        num_classes: logits per image.
        width: channels of the first convolution, to which all others are in proportion; default as published.
        stem_relu: the counting convention; the ReLU behind the stem, in WideResNets the one behind the last batch norm.
            VGGs have neither: nothing changes there.
        in_channels: channels of the image.
        multipliers: channels of each stage after the first as a factor of those before; ResNets and WideResNets.
        blocks: per stage; ResNets and WideResNets.
        rho: 1, or 0.5 for feature maps of half the height and width (DeepReDuce, section 3.3).
        reuse: convolutions in groups of which one has ReLUs (DeepReShape, section 4.2): `reuse.with_reuse`'s settings.
        channels: of each stage, any numbers, in place of width (which is the first of them) and multipliers; ResNets.

    Raises:
        ValueError: an unknown name (the message lists the known ones), or a setting that is no int from 1 to its limit,
            of another length than the network has stages, not 1 or 0.5, not to be changed in this family, at odds with
            another, or (`reuse`) for layers that the network does not have or that cannot be split.
    """
    family = _family(name)
    free = None if channels is None else _channels(name, family, channels, width, multipliers)
    width = (family.width if free is None else free[0]) if width is None else width
    for argument, value in (("num_classes", num_classes), ("width", width), ("in_channels", in_channels)):
        _check_int(argument, value, _MOST[argument])
    if isinstance(rho, bool) or rho not in RHOS:
        raise ValueError(f"models.create: rho must be 1 or 0.5 (got {rho!r:.80})")
    shape: dict[str, Any] = dict(_shape(name, family, width, multipliers, blocks))
    if free is not None:
        shape["channels"] = free
    model = family.build(
        num_classes=num_classes,
        width=width,
        stem_relu=stem_relu,
        in_channels=in_channels,
        rho=float(rho),
        **shape,
    )
    return model if reuse is None else with_reuse(model, reuse)


def _family(name: str) -> Family:
    family = family_of(name) if isinstance(name, str) else None
    if family is None:
        raise ValueError(f"models.create: name must be one of {', '.join(known())} (got {name!r:.80})")
    return family


def known() -> tuple[str, ...]:
    """`names()` without the families that have a pattern, then the patterns: what a message lists."""
    return (*(name for name in PUBLISHED if not name.startswith(("wrn", "hrn"))), *PATTERNS)


def _shape(
    name: str, family: Family, width: int, multipliers: Sequence[int] | None, blocks: Sequence[int] | None
) -> dict[str, tuple[int, ...]]:
    """The checked `multipliers` and `blocks` for the family's builder; empty if its shape is fixed."""
    if family.multipliers is None or family.blocks is None:
        for argument, given in (("multipliers", multipliers), ("blocks", blocks)):
            if given is not None:
                raise ValueError(f"models.create: {argument} must not be given for {name} (got {given!r:.80})")
        return {}
    factors = _checked_tuple("multipliers", multipliers, family.multipliers, _MOST_MULTIPLIER)
    if family.named and factors != family.multipliers:
        raise ValueError(f"models.create: multipliers must be {family.multipliers} for {name} (got {factors})")
    if family.channels(width, factors) > _MOST_CHANNELS:
        raise ValueError(
            f"models.create: width {width} and multipliers {factors} give more than {_MOST_CHANNELS} channels"
        )
    return {"multipliers": factors, "blocks": _checked_tuple("blocks", blocks, family.blocks, _MOST_BLOCKS)}


def _channels(
    name: str, family: Family, channels: Sequence[int], width: int | None, multipliers: Sequence[int] | None
) -> tuple[int, ...]:
    """The checked `channels`."""
    if not family.free:
        raise ValueError(f"models.create: channels must not be given for {name} (got {channels!r:.80})")
    if multipliers is not None:
        raise ValueError(f"models.create: multipliers must not be given beside channels (got {multipliers!r:.80})")
    found = _checked_tuple("channels", channels, (0,) * family.stages, _MOST_CHANNELS)
    if width not in (None, found[0]):
        raise ValueError(f"models.create: width must be the first of channels {found} (got {width!r:.80})")
    return found


def _checked_tuple(
    argument: str, given: Sequence[int] | None, published: tuple[int, ...], most: int
) -> tuple[int, ...]:
    if given is None:
        return published
    if not isinstance(given, list | tuple) or len(given) != len(published):
        raise ValueError(f"models.create: {argument} must be {len(published)} ints (got {given!r:.80})")
    for value in given:
        _check_int(argument, value, most)
    return tuple(given)


def _check_int(argument: str, value: object, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise ValueError(f"models.create: {argument} must be an int in 1..{most} (got {value!r:.80})")


def convention(stem_relu: bool, name: str = "resnet18") -> str:
    """Which of the two published ways of counting the ReLUs of the network `name` is meant by `stem_relu`."""
    return _CONVENTIONS[_family(name).stem, stem_relu]


_CONVENTIONS = {
    ("stem", True): "stem ReLU counted, as in DeepReDuce, DeepReShape, SENet",
    ("stem", False): "no ReLU after the stem, as in SNL, AutoReP, DeepShare",
    ("last", True): "ReLU after the last batch norm counted, as in DeepReShape, SENet",
    ("last", False): "no ReLU after the last batch norm, as in SNL, AutoReP, DeepShare",
    ("none", True): "every ReLU counted; there is no stem",
    ("none", False): "every ReLU counted; there is no stem",
}


def describe(spec: Mapping[str, Any]) -> str:
    """One line: the name, what differs from the published network, and the counting convention."""
    name = spec["name"]
    width = width_of(spec)
    shape = [f"{key} {_joined(spec[key])}" for key in ("multipliers", "channels", "blocks") if spec.get(key)]
    rho = [f"rho {spec['rho']:g}"] if spec.get("rho", 1.0) != 1.0 else []
    reuse = [_reuse(spec["reuse"])] if spec.get("reuse") else []
    return (
        f"{', '.join([name, f'width {width}', *shape, *rho, *reuse])}: {convention(spec.get('stem_relu', False), name)}"
    )


def _reuse(settings: Mapping[str, Any]) -> str:
    form = settings.get("form", "three") + ("" if settings.get("shortcuts", True) else " without shortcuts")
    return f"ReLU-reuse by {settings['factor']} ({form}) in {len(settings['layers'])} layers"


def _joined(values: Sequence[int]) -> str:
    return "-".join(map(str, values))


def shapes_only(spec: Mapping[str, Any]) -> nn.Module:
    """The model of `create(**spec)` (`input_size` aside) on the meta device: for counting, which needs no weights.

    Raises:
        PlanError: what `create` refuses.
    """
    check_is_spec("models.shapes_only", spec)
    settings = {"num_classes": 2, **{key: value for key, value in spec.items() if key != "input_size"}}
    try:
        with torch.device("meta"):
            return create(**settings)
    except ValueError as error:
        raise PlanError(str(error)) from error


def count_table(
    name: str,
    input_size: tuple[int, ...],  # (C, H, W)
    *,
    plan: Plan | None = None,
    **settings: Any,
) -> str:
    """The table `deepshare count` prints: every site of a model by name, or of `plan`, which must fit it.

    `settings` are `create`'s `width`, `stem_relu`, `multipliers`, `blocks`, `rho` and `channels`.

    Raises:
        PlanError: as `create`; or `plan` is for another model or image size.
    """
    size = checked_image_size("models.count_table", input_size)
    spec = {"name": name, "in_channels": size[0], **settings}
    found = Plan.of(shapes_only(spec), size)
    if plan is not None:
        plan.check_fits(found)
    return f"{describe(spec)}\n{(plan or found).table()}"
