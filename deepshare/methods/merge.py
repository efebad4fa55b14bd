"""Adjacent linear layers as one layer: what dropping ReLUs makes possible (DeepReDuce, sections 1 and 5.3)."""

import copy
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp, TensorMetadata

from deepshare.find import zero_batch
from deepshare.fold import fold_batch_norm
from deepshare.graph import check_outputs, graph_module, is_addition, works_in_place
from deepshare.methods.conv_algebra import BiasMapConv2d, Convolution, Geometry, MergeError, Pair
from deepshare.site import PlanError, checked_image_size
from deepshare.text_table import aligned
from deepshare.trace import keep_constants, trace

MergeKind = Literal["sequence", "sum"]
_LAYERS = (nn.Conv2d, BiasMapConv2d, nn.Linear)
_NOTHING_IN_EVAL = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)


@dataclass(frozen=True)
class Size:
    """How much linear work a network does per image.

    layers: calls of Conv2d and Linear; depth: the most of them on one path from the image to the logits;
    multiplications: multiply-accumulates in them (taps on padding counted, biases and batch norms not)
    """

    layers: int
    depth: int
    multiplications: int


@dataclass(frozen=True)
class Merge:
    """Two places in the graph that became one layer, or did not.

    kind: "sequence" (one reads the other) or "sum" (both read one value; the shortcut is called "identity")
    layers: their paths; cost: multiplications after / before; exact: the outputs are equal; why_not: None if merged
    """

    kind: MergeKind
    layers: tuple[str, str]
    cost: float
    exact: bool
    why_not: str | None = None


@dataclass(frozen=True)
class MergeReport:
    """What `merge_linear` did: sizes with batch norms folded and after merging; merges in order; what stayed apart."""

    before: Size
    after: Size
    merges: tuple[Merge, ...]
    apart: tuple[Merge, ...]

    @property
    def exact(self) -> bool:
        """Whether the merged network computes what the given one did; otherwise it has to be finetuned."""
        return all(merge.exact for merge in self.merges)

    def table(self) -> str:
        """Both sizes, then one line per merge and per pair left apart, with the reason."""
        rows = [("", "layers", "depth", "multiplications")]
        for name, size in (("before", self.before), ("after", self.after)):
            rows.append((name, str(size.layers), str(size.depth), f"{size.multiplications:,}"))
        lines = [aligned(rows)]
        for merge in (*self.merges, *self.apart):
            done = "exact" if merge.exact else "differs at the border"
            what = f"merged, {done}" if merge.why_not is None else f"apart: {merge.why_not}"
            lines.append(f"{' + '.join(merge.layers)} ({merge.kind}, {merge.cost:.2f} x multiplications): {what}")
        return "\n".join(lines)


def merge_linear(
    model: nn.Module,
    input_size: Sequence[int],  # (C, H, W)
    *,
    inexact: bool = False,
    max_cost: float = 1.0,
    bias_maps: bool = True,
) -> tuple[nn.Module, MergeReport]:
    """`model` in eval mode with fewer linear layers: batch norms folded, convolutions without a ReLU between merged.

    A sequence of two convolutions is one convolution where the second pads nothing, or the first is 1x1 without
    padding (its bias, seen through the second's padding, then differs near the border: `BiasMapConv2d`). A sum of two
    convolutions of one value, or of one and the value itself, is one convolution where strides and paddings fit.
    Linear layers merge alike. Nothing is merged over a result that something else reads too.

    Args:
        model: usually of `apply_plan`: its linear sites are passed through.
        input_size: of the images; shapes, costs and bias maps depend on it.
        inexact: also merge where the second pads and the first is larger than 1x1: two padded 3x3 become a 5x5 that is
            equal inside and differs at the border, where the second saw zeros and the 5x5 goes on computing. **Finetune
            it after merging.** At equal channels it costs 25/18 of the multiplications: max_cost must allow that.
        max_cost: no merge may multiply the multiplications of its two layers by more; math.inf: the fewest layers.
        bias_maps: whether a merge may need a bias per position.

    Returns:
        A GraphModule of its own weights, all trainable, and the report. Activations keep their paths.

    Raises:
        PlanError: input_size is no image size, the model does not run on such images, or cannot be traced by torch.fx.
        ValueError: max_cost is no number above 0.
    """
    if not isinstance(max_cost, int | float) or not max_cost > 0:
        raise ValueError(f"merge_linear: max_cost must be above 0 (got {max_cost!r})")
    size = checked_image_size("merge_linear", input_size)
    merger = _Merger(_in_eval(model, size), inexact, max_cost, bias_maps)
    before = merger.size()
    merger.run()
    report = MergeReport(before, merger.size(), tuple(merger.merges), merger.apart())
    merger.graph_module.delete_all_unused_submodules()
    return merger.graph_module.requires_grad_(True), report


def _in_eval(model: nn.Module, size: tuple[int, ...]) -> fx.GraphModule:
    """The model's graph with shapes on its nodes, identities gone, batch norms folded."""
    here = f"merge_linear: {type(model).__name__} cannot be traced by torch.fx:"
    probe, graph = trace(model, here)
    try:
        check_outputs(model, probe, graph, size, here)
    except PlanError:
        raise
    except Exception as error:
        raise PlanError(
            f"merge_linear: {type(model).__name__} does not run on an image {list(size)}: {error}"
        ) from error
    result = copy.deepcopy(model).eval()
    keep_constants(graph, probe, result)
    traced = graph_module(result, graph)
    for node in list(traced.graph.nodes):
        if node.op == "call_module" and isinstance(traced.get_submodule(str(node.target)), _NOTHING_IN_EVAL):
            node.replace_all_uses_with(node.args[0])
            traced.graph.erase_node(node)
    fold_batch_norm(traced)
    with torch.no_grad():
        ShapeProp(traced).propagate(zero_batch(model, size))
    return traced


@dataclass(frozen=True, eq=False)
class _Layer:
    """A summand or a member of a sequence: its node, and what it computes. The shortcut of a sum has no node."""

    node: fx.Node | None
    conv: Convolution

    @property
    def path(self) -> str:
        return "identity" if self.node is None else str(self.node.target)


class _Merger:
    """Merges pair after pair in `graph_module`, in place, until none is left that may be merged."""

    def __init__(self, traced: fx.GraphModule, inexact: bool, max_cost: float, bias_maps: bool) -> None:
        self.graph_module = traced
        self.merges: list[Merge] = []
        self._inexact, self._max_cost, self._bias_maps = inexact, max_cost, bias_maps
        self._refused: dict[fx.Node, Merge] = {}

    def run(self) -> None:
        while any(self._merged_at(node) for node in list(self.graph_module.graph.nodes)):
            self._refused.clear()  # what kept a pair apart may be gone
        self.graph_module.graph.lint()
        self.graph_module.recompile()

    def apart(self) -> tuple[Merge, ...]:
        """Pairs that stand like one layer and were left two, in call order."""
        return tuple(self._refused[node] for node in self.graph_module.graph.nodes if node in self._refused)

    def size(self) -> Size:
        """Of the graph as it is."""
        depth: dict[fx.Node, int] = {}
        layers = multiplications = 0
        for node in self.graph_module.graph.nodes:
            is_layer = isinstance(self._module(node), _LAYERS)
            depth[node] = max((depth[source] for source in node.all_input_nodes), default=0) + is_layer
            layers += is_layer
            multiplications += self._multiplications(node)
        return Size(layers, max(depth.values(), default=0), multiplications)

    def _merged_at(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return self._sequence(node)
        return is_addition(node) and self._sum(node)

    def _sequence(self, node: fx.Node) -> bool:
        second = self._layer(node)
        first = None if second is None else self._layer(node.args[0], reader=node)
        if first is None or second is None or self._is_linear(first) != self._is_linear(second):
            return False
        merged = second.conv.geometry.after(first.conv.geometry)
        exact = second.conv.geometry.same_border_after(first.conv.geometry)
        maps = first.conv.bias.dim() > 1 or (exact and second.conv.needs_map_after(first.conv))
        if not self._agreed("sequence", (first, second), merged, node, exact=exact, maps=maps):
            return False
        between = _positions(first.node) if exact or first.conv.bias.dim() > 1 else None
        self._put(first, second, node, second.conv.after(first.conv, between))
        return True

    def _sum(self, node: fx.Node) -> bool:
        pair = self._summands(node)
        if pair is None:
            return False
        one, other = pair
        assert one.node is not None
        size = _positions(one.node.args[0])
        try:
            merged = one.conv.geometry.beside(other.conv.geometry, size)
        except MergeError as error:
            self._refused[node] = Merge("sum", (one.path, other.path), math.nan, True, str(error))
            return False
        maps = one.conv.bias.dim() > 1 or other.conv.bias.dim() > 1
        if not self._agreed("sum", (one, other), merged, node, exact=True, maps=maps):
            return False
        self._put(one, other, node, one.conv.beside(other.conv, size))
        return True

    def _agreed(
        self, kind: MergeKind, pair: tuple[_Layer, _Layer], merged: Geometry, node: fx.Node, *, exact: bool, maps: bool
    ) -> bool:
        """Whether the settings allow this merge; notes it, or why not."""
        old = sum(self._multiplications(layer.node) for layer in pair)
        if old == 0:  # a batch norm and the value itself, or two batch norms: no layer to be saved
            return False
        cost = merged.multiplications(_outputs(node) // merged.outputs) / old
        why_not = None
        if not exact and not self._inexact:
            why_not = "both pad, so the border would differ (inexact=False)"
        elif maps and not self._bias_maps:
            why_not = "it takes a bias per position (bias_maps=False)"
        elif cost > self._max_cost:
            why_not = f"it costs more (max_cost={self._max_cost:g})"
        merge = Merge(kind, (pair[0].path, pair[1].path), cost, exact, why_not)
        if why_not is None:
            self.merges.append(merge)
        else:
            self._refused[node] = merge
        return why_not is None

    def _put(self, one: _Layer, other: _Layer, node: fx.Node, conv: Convolution) -> None:
        """`conv` where `one` was called: what it reads is read when it always was. `node` had the result of both."""
        kept, linear = one.node, self._is_linear(one)
        assert kept is not None
        like = next(t for t in self._tensors(kept) if t.is_floating_point())
        if not isinstance(self._module(kept), _LAYERS) and other.node is not None:
            kept.target = other.node.target  # a merged layer is not found under a batch norm's name
        self.graph_module.set_submodule(str(kept.target), conv.module(like, linear=linear))
        kept.meta["tensor_meta"] = node.meta["tensor_meta"]
        node.replace_all_uses_with(kept)
        self.graph_module.graph.erase_node(node)
        if other.node is not None and other.node is not node:
            self.graph_module.graph.erase_node(other.node)

    def _layer(self, node: object, reader: fx.Node | None = None) -> _Layer | None:
        """What `node` calls, if that is a convolution of one tensor, called once, and read by `reader` alone."""
        if not isinstance(node, fx.Node) or node.op != "call_module" or len(node.all_input_nodes) != 1 or node.kwargs:
            return None
        calls = sum(other.target == node.target for other in self.graph_module.graph.nodes)
        if calls != 1 or (reader is not None and list(node.users) != [reader]):
            return None
        conv = Convolution.of(self.graph_module.get_submodule(str(node.target)))
        return None if conv is None else _Layer(node, conv)

    def _summands(self, node: fx.Node) -> tuple[_Layer, _Layer] | None:
        """Two layers of one value, or a layer and the value itself, whose sum `node` is."""
        shapes = {_shape(argument) for argument in (*node.args, node)}
        if len(node.args) != 2 or node.args[0] is node.args[1] or node.kwargs or len(shapes) != 1 or None in shapes:
            return None
        layers = [self._layer(argument, reader=node) for argument in node.args]
        one = layers[0] or layers[1]
        if one is None or one.node is None:
            return None
        source, modules = one.node.args[0], dict(self.graph_module.named_modules())
        if any(works_in_place(user, modules) and user.args[0] is source for user in _users(source)):
            return None
        if layers[0] is not None and layers[1] is not None:
            same = layers[1].node is not None and layers[1].node.args[0] is source
            return (layers[0], layers[1]) if same and self._is_linear(layers[0]) == self._is_linear(layers[1]) else None
        identity = Convolution.identity(one.conv.geometry.outputs, one.conv.weight)
        return (one, _Layer(None, identity)) if source in node.args else None

    def _module(self, node: fx.Node | None) -> nn.Module | None:
        if node is None or node.op != "call_module":
            return None
        return self.graph_module.get_submodule(str(node.target))

    def _tensors(self, node: fx.Node) -> Iterator[Tensor]:
        module = self._module(node)
        assert module is not None
        return itertools.chain(module.parameters(), module.buffers())

    def _is_linear(self, layer: _Layer) -> bool:
        return isinstance(self._module(layer.node), nn.Linear)

    def _multiplications(self, node: fx.Node | None) -> int:
        module = self._module(node)
        if node is None or not isinstance(module, _LAYERS):
            return 0
        weight = (module.conv if isinstance(module, BiasMapConv2d) else module).weight
        return _outputs(node) * math.prod(weight.shape[1:])


def _users(source: object) -> Iterator[fx.Node]:
    return iter(source.users) if isinstance(source, fx.Node) else iter(())


def _shape(node: object) -> tuple[int, ...] | None:
    """Of what a node gives for one image; None for what is no tensor."""
    meta = node.meta.get("tensor_meta") if isinstance(node, fx.Node) else None
    return tuple(meta.shape) if isinstance(meta, TensorMetadata) else None


def _outputs(node: fx.Node) -> int:
    """Values per image."""
    return math.prod((_shape(node) or (1,))[1:])


def _positions(node: object) -> Pair:
    """(H, W) of a node's result; (1, 1) where a Linear works on it."""
    shape = _shape(node) or ()
    return (shape[2], shape[3]) if len(shape) == 4 else (1, 1)
