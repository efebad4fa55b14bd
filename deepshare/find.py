"""Which activations a model calls, in call order: seen by running it once on a zero image.

A run sees what a trace may not (control flow, calls inside torch.nn's own blocks), so counting needs no traceable
model. Only rewriting does (graph.py).
"""

import copy
import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from deepshare.nn import MaskedReLU2d, SharedReLU2d
from deepshare.site import Kind, Mask, PlanError, Site, checked_image_size

PLAIN: dict[Kind, type[nn.Module]] = {"relu": nn.ReLU, "relu6": nn.ReLU6, "gelu": nn.GELU}  # sites without a state
STATEFUL = (SharedReLU2d, MaskedReLU2d)
MAY_WORK_IN_PLACE = (nn.ReLU, nn.ReLU6)
_ATEN = torch.ops.aten
RELU_FUNCTIONS = frozenset(
    {
        *(F.relu, torch.relu, torch.relu_, torch.Tensor.relu, torch.Tensor.relu_),
        *(_ATEN.relu, _ATEN.relu.default, _ATEN.relu_, _ATEN.relu_.default),
    }
)
RELU6_FUNCTIONS = frozenset(
    {
        *(F.relu6, torch._C._nn.relu6, torch._C._nn.relu6_),
        *(_ATEN.relu6, _ATEN.relu6.default, _ATEN.relu6_, _ATEN.relu6_.default),
    }
)
_LINEAR_MARK = "is_linear_site"


def linear_activation() -> nn.Identity:
    """The module of a linear site: an nn.Identity that `find_calls` tells from the identities a model has anyway."""
    identity = nn.Identity()
    setattr(identity, _LINEAR_MARK, True)
    return identity


def is_activation(module: nn.Module) -> bool:
    """Whether a call of `module` is a site."""
    return (
        isinstance(module, STATEFUL) or plain_kind(module) is not None or getattr(module, _LINEAR_MARK, False) is True
    )


def plain_kind(module: nn.Module) -> Kind | None:
    """The kind of an activation without a state. A subclass with another forward is none: what that calls counts."""
    for kind, made in PLAIN.items():
        if isinstance(module, made) and type(module).forward is made.forward:
            return kind
    return None


def function_kind(function: object) -> Literal["relu", "relu6"] | None:
    """What a call of `function` is; None if it is no site."""
    if not isinstance(function, Hashable):
        return None
    return "relu" if function in RELU_FUNCTIONS else "relu6" if function in RELU6_FUNCTIONS else None


class SiteNames:
    """Names in call order: `path`, `path@2`, ... Run and trace must name alike, so both name here."""

    def __init__(self) -> None:
        self._calls: Counter[str] = Counter()

    def of_module(self, path: str) -> str:
        return self._next(path)

    def of_function(self, caller: str, kind: Literal["relu", "relu6"]) -> str:
        return self._next(f"{caller}:{kind}")

    def _next(self, base: str) -> str:
        self._calls[base] += 1
        return base if self._calls[base] == 1 else f"{base}@{self._calls[base]}"


@dataclass(frozen=True)
class Call:
    """One activation call.

    Attributes:
        site: as it stands.
        module: path of the called module, None for a function.
        features_last: it activates what a linear layer made of [N, ..., features]; dimension 1 is no channel then.
    """

    site: Site
    module: str | None
    features_last: bool = False


def check_is_model(here: str, model: object) -> None:
    """Raises PlanError unless `model` is an nn.Module: a name and a class are none."""
    if not isinstance(model, nn.Module):
        raise PlanError(f"{here}: model must be an nn.Module (got {model!r:.80})")


def find_calls(model: nn.Module, input_size: Iterable[int]) -> list[Call]:
    """The activation calls of one forward pass in eval mode on a zero batch [1, *input_size], in call order.

    Sites are nn.ReLU, nn.ReLU6 and nn.GELU modules, functional ReLUs (F.relu, torch.relu, Tensor.relu, F.relu6, in
    place or not) and what `apply_plan` puts in their place. Calls are counted, not modules. Leaky and functional GELUs
    are no sites, nor is a clamp.
    The model is not changed: a copy runs, with copied buffers and the model's own parameters.

    Raises:
        PlanError: input_size is no image size; model is no nn.Module, or does not run on such a batch; a site's first
            dimension is not the batch, so that per image cannot be told; or a ScriptModule is there, whose inside
            cannot be seen.
    """
    size = checked_image_size("find_calls", input_size)
    check_is_model("find_calls", model)
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise PlanError(f"find_calls: module {path!r} is a ScriptModule: its activations cannot be seen")
    probe = without_weights(model).eval()
    watch = _Watch(probe)
    try:
        with torch.no_grad(), watch:
            probe(zero_batch(probe, size))
    except PlanError:
        raise
    except Exception as error:
        raise PlanError(f"find_calls: {type(model).__name__} does not run on a batch {[1, *size]}: {error}") from error
    return watch.calls


def relies_on_in_place(model: nn.Module, input_size: Iterable[int]) -> bool:
    """Whether some ReLU or ReLU6 module must work in place: the output on a random image is another if none does."""

    def without(probe: nn.Module, image: Tensor) -> object:
        for module in probe.modules():
            if isinstance(module, MAY_WORK_IN_PLACE):
                module.inplace = False
        return probe(image)

    size = tuple(input_size)
    return not same_outputs(outputs(model, size), outputs(model, size, without))


def outputs(
    model: nn.Module,
    input_size: tuple[int, ...],
    run: Callable[[nn.Module, Tensor], object] = lambda probe, image: probe(image),
) -> list[Tensor]:
    """The tensors that a copy of `model` in eval mode returns for a random image, always the same one."""
    probe = without_weights(model).eval()
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        leaves = tree_leaves(run(probe, torch.randn_like(zero_batch(probe, input_size))))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def same_outputs(some: list[Tensor], others: list[Tensor], tolerance: float = 0) -> bool:
    """Whether both are the same to `tolerance` times the largest. Tensors without values (meta) are not known to be."""
    if len(some) != len(others) or any(tensor.is_meta for tensor in (*some, *others)):
        return False
    pairs = zip(some, others, strict=True)
    return all(a.shape == b.shape and bool(_near(a.double(), b.double(), tolerance)) for a, b in pairs)


def _near(a: Tensor, b: Tensor, tolerance: float) -> bool:
    largest = float(a.nan_to_num(0, 0, 0).abs().max()) if a.numel() else 0
    return torch.allclose(a, b, rtol=0, atol=tolerance * largest, equal_nan=True)


def zero_batch(model: nn.Module, size: tuple[int, ...]) -> Tensor:
    """One image [1, *size] on the model's device, in its weights' dtype."""
    reference = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    return torch.zeros(1, *size, dtype=reference.dtype, device=reference.device)


def _per_image(name: str, activation: Tensor) -> tuple[int, ...]:
    """Its shape without the batch. The probe has one image: any other size in front is no batch, and would be lost."""
    if activation.dim() == 0 or activation.shape[0] != 1:
        raise PlanError(
            f"site {name!r}: the first dimension must be the batch, here 1 (got shape {list(activation.shape)}); "
            "a sequence or heads in front of it cannot be counted per image"
        )
    return tuple(activation.shape[1:])


def without_weights(model: nn.Module) -> nn.Module:
    """A deep copy that shares the model's parameters, for looking at: forward may change its buffers and attributes.

    Raises:
        PlanError: the model cannot be copied.
    """
    try:
        return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    except Exception as error:  # such as a weight that torch.nn.utils.weight_norm computed
        raise PlanError(f"{type(model).__name__} cannot be copied: {error}") from error


@dataclass
class _Leader:
    """A shared site with gates of its own: its name, P, and what a follower may be given as source.

    That is the very tensor it was called with, or what it returned with its result.
    """

    name: str
    prototypes: int
    offers: list[Any]


@dataclass
class _Watch(TorchFunctionMode):
    """Records activation calls: modules by forward hooks, functions by the function mode (deaf inside activations)."""

    model: nn.Module
    calls: list[Call] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self._names = SiteNames()
        self._stack: list[str] = []
        self._inside = 0
        self._leaders: list[_Leader] = []
        self._features_last: list[weakref.ref[Tensor]] = []
        for path, module in self.model.named_modules():
            enter, leave = self._activation(path) if is_activation(module) and path else self._caller(path)
            module.register_forward_pre_hook(enter, with_kwargs=True)
            module.register_forward_hook(leave)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is F.linear and result.dim() > 2:
            self._features_last.append(weakref.ref(result))
        kind = None if self._inside else function_kind(func)
        if kind is not None:
            name = self._names.of_function(self._stack[-1], kind)
            x = args[0] if args else (kwargs or {}).get("input")
            self.calls.append(Call(Site(name, _per_image(name, result), kind), None, self._is_features_last(x)))
        return result

    def _caller(self, path: str) -> tuple[Callable[..., None], Callable[..., None]]:
        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            self._stack.append(path)

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            self._stack.pop()

        return enter, leave

    def _activation(self, path: str) -> tuple[Callable[..., None], Callable[..., None]]:
        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not self._inside:
                self._record(path, module, args, kwargs)
            self._inside += 1

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            self._inside -= 1
            if isinstance(output, tuple) and not self._inside:  # SharedReLU2d with return_gates
                for leader in self._leaders:
                    if leader.offers[0] is args[0]:
                        leader.offers.append(output[1])

        return enter, leave

    def _record(self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x: Tensor = args[0] if args else kwargs["x" if "x" in kwargs else "input"]
        name = self._names.of_module(path)
        shape = _per_image(name, x)
        if isinstance(module, SharedReLU2d):
            source = args[1] if len(args) > 1 else kwargs.get("source")
            site = self._shared(name, shape, module, x, source)
        elif isinstance(module, MaskedReLU2d):
            site = Site(name, shape, "mask", mask=Mask.of(module.mask), zero_out=module.zero_out)
        else:
            site = Site(name, shape, plain_kind(module) or "linear")
        self.calls.append(Call(site, path, self._is_features_last(x)))

    def _is_features_last(self, x: object) -> bool:
        return any(made() is x for made in self._features_last)

    def _shared(self, name: str, shape: tuple[int, ...], module: SharedReLU2d, x: Tensor, source: object) -> Site:
        """A follower if its gates are a known leader's. Gates of another source are compared, and so paid, here."""
        for leader in self._leaders:
            if leader.prototypes == module.prototypes and any(source is offer for offer in leader.offers):
                return Site(name, shape, "shared", leader=leader.name)
        if source is None:
            self._leaders.append(_Leader(name, module.prototypes, [x]))
        return Site(name, shape, "shared", prototypes=module.prototypes)
