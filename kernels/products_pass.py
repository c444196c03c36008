"""Products of few rows in a traced graph become our kernels where those were measured faster than cuBLAS.

Enters: a graph whose weights are its attributes. Leaves: the same graph with `auxstream::skinny_linear` in place of
products, those that share their input in one launch if that is faster, and a `ProductsReport`; `choose_gated` does the
same of one row's gate and up projections with act(gate) * up behind them, for which it must come before fusion.
Invariant: all nodes that become one have the same region, or none; without times (no GPU, say) nothing is replaced;
metadata is kept.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeGuard

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from .call import Call
from .dataflow import Dataflow
from .derive import derived
from .products import gated_linear, skinny_linear
from .products_work import MOST_WEIGHTS, Work, refusal

aten = torch.ops.aten

_MARGIN: Final = 1.02
"""By how much ours must be faster: less than that is noise, or another process's luck."""
_MOST_CALLS: Final = 16


@dataclass(frozen=True, slots=True)
class Times:
    """Microseconds per call: by the fastest of our tiles, and by cuBLAS."""

    ours: float
    cublas: float

    @property
    def best(self) -> float:
        return self.ours if self.won else self.cublas

    @property
    def won(self) -> bool:
        return self.ours * _MARGIN < self.cublas


Judge = Callable[[Sequence[Work]], Times | None]
"""The times of calls that are alike but for their weights; None where nobody may say."""


@dataclass(frozen=True, slots=True)
class Replaced:
    """One launch: the products it stands for, and what was measured."""

    nodes: tuple[str, ...]
    shape: str
    times: Times


@dataclass(frozen=True, slots=True)
class ProductsReport:
    """What was replaced, in graph order; how many products of few rows there were."""

    replaced: tuple[Replaced, ...]
    products: int

    def __str__(self) -> str:
        by_shape: dict[tuple[str, Times], int] = {}
        for one in self.replaced:
            by_shape[one.shape, one.times] = by_shape.get((one.shape, one.times), 0) + 1
        ours = sum(len(one.nodes) for one in self.replaced)
        lines = [f"{ours} of {self.products} products of few rows in {len(self.replaced)} launches of our own"]
        for (shape, times), count in by_shape.items():
            lines.append(f"  {count} x {shape}: {times.ours:.2f} us, cuBLAS {times.cublas:.2f} us")
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class _Product:
    """A product with a weight that is an attribute of the graph, and perhaps with a bias."""

    node: Node
    x: Node
    weight: Node
    bias: Node | None

    @property
    def mark(self) -> object:
        """The region it belongs to."""
        return self.node.meta.get("auxstream")


Group = tuple[_Product, ...]


def choose_products(gm: GraphModule, judge: Judge | None = None) -> ProductsReport:
    """Replace products of few rows in place, alone or with those that share their input, as is fastest.

    Args:
        gm: an ATen graph whose nodes have `meta["val"]`.
        judge: says how fast each group is, ours and torch's; by default measured once per shape and card, and nothing
            is replaced without a GPU.

    Returns:
        what was replaced, and how many products there were.
    """
    flow = Dataflow.of(gm)
    products = list(_products(flow))
    groups = list(_groups(flow, products))
    alone = [(product,) for product in products]
    times = _judged(gm, [*alone, *(group for group in groups if len(group) > 1)], judge or measured)
    replaced: list[Replaced] = []
    instead: dict[Node, Node] = {}
    for group in groups:
        for part in _partition(group, times):
            _replace(part, instead)
            replaced.append(Replaced(_names(part), _shape(part), times[part]))
    return _finished(gm, replaced, len(products))


def choose_gated(gm: GraphModule, judge: Judge | None = None) -> ProductsReport:
    """Replace act(gate) * up in place, with both its products, where that is faster than they and one kernel.

    Args:
        gm: an ATen graph whose nodes have `meta["val"]`; before fusion.
        judge: as of `choose_products`.

    Returns:
        what was replaced, and how many products there were.
    """
    flow = Dataflow.of(gm)
    products = {product.node: product for product in _products(flow)}
    pairs: dict[Group, tuple[Node, str]] = {}
    for node in flow.nodes:
        if (found := _pair(flow, products, node)) is not None:
            pairs[found[0]] = found[1]
    times = _judged(gm, list(pairs), judge or measured, {pair: name for pair, (_, name) in pairs.items()})
    replaced: list[Replaced] = []
    instead: dict[Node, Node] = {}
    for pair, (tail, name) in pairs.items():
        if pair in times and times[pair].won:
            _replace_gated(pair, tail, name, instead)
            replaced.append(Replaced(_names(pair), f"{_shape(pair)}, {name}", times[pair]))
    return _finished(gm, replaced, len(products))


def compile_ahead(classes: Sequence[Work]) -> None:
    """Compile what the verdicts on these classes of calls will need, all of it side by side."""
    if any(work.x.is_cuda for work in classes) and not torch.cuda.is_current_stream_capturing():
        from .products_plan import compile_unjudged  # imports triton

        compile_unjudged(classes)


def measured(works: Sequence[Work]) -> Times | None:
    """What a GPU says, once per shape class; None on anything else, and in a capture."""
    if not works[0].x.is_cuda or torch.cuda.is_current_stream_capturing():
        return None
    from .products_plan import judge  # imports triton

    verdict = judge(works)
    return Times(verdict.ours, verdict.cublas)


# --- finding ----------------------------------------------------------------------------------------------------------


def _products(flow: Dataflow) -> Iterator[_Product]:
    for node in flow.nodes:
        if node.op == "call_function" and (found := _product(flow, node)) is not None:
            yield found


def _product(flow: Dataflow, node: Node) -> _Product | None:
    if node.target is aten.linear.default:
        x, weight, bias = (Call.of(node).arguments[name] for name in ("input", "weight", "bias"))
    elif node.target in (aten.mm.default, aten.matmul.default):
        x, weight, bias = node.args[0], _transposed(node.args[1]), None
    elif node.target is aten.addmm.default:
        call = Call.of(node).arguments
        if call["beta"] != 1 or call["alpha"] != 1:
            return None
        x, weight, bias = call["mat1"], _transposed(call["mat2"]), call["self"]
    else:
        return None
    if not isinstance(x, Node) or not _is_parameter(weight, flow) or not (bias is None or _is_parameter(bias, flow)):
        return None
    found = _Product(node, x, weight, bias)
    return None if flow.constants >> flow.index[x] & 1 or not _fits(found) else found


def _transposed(node: Any) -> Node | None:
    """What a transposed matrix is a view of."""
    if not isinstance(node, Node) or not node.args or not isinstance(node.args[0], Node):
        return None
    turned = node.target is aten.t.default
    turned |= node.target is aten.transpose.int and set(node.args[1:]) in ({0, 1}, {-1, -2}, {0, -1}, {-2, 1})
    turned |= node.target is aten.permute.default and node.args[1] == [1, 0]
    return node.args[0] if turned else None


def _is_parameter(node: Any, flow: Dataflow) -> TypeGuard[Node]:
    return isinstance(node, Node) and node.op == "get_attr" and bool(flow.constants >> flow.index[node] & 1)


def _fits(product: _Product) -> bool:
    """Whether there is a kernel; shapes that are symbols have none."""
    found: list[Tensor] = []
    for node in (product.x, product.weight, product.bias):
        value = node.meta.get("val") if node is not None else None
        if isinstance(value, Tensor):
            found.append(value)
        elif node is not None:
            return False
    x, weight, *bias = found
    if not x.dim() or not all(type(size) is int for value in found for size in value.shape):
        return False
    rows = x.numel() // max(x.shape[-1], 1)
    work = Work(x.new_empty(rows, x.shape[-1]), (weight,), tuple(bias))
    return rows > 0 and not refusal(work)


def _groups(flow: Dataflow, products: Sequence[_Product]) -> Iterator[Group]:
    """Products of one input, of one region: those that may be one launch."""
    open_groups: dict[Any, list[_Product]] = {}
    for product in products:
        key = (product.x, product.mark, product.node.meta["val"].dtype, product.bias is None)
        group = open_groups.setdefault(key, [])
        if group and (len(group) == MOST_WEIGHTS or not _undisturbed(flow, group[0], product.node)):
            yield tuple(group)
            group = open_groups[key] = []
        group.append(product)
    yield from (tuple(group) for group in open_groups.values())


def _undisturbed(flow: Dataflow, first: _Product, last: Node) -> bool:
    """Whether the input is the same all the way: nothing in between writes it, or may write anything."""
    start, end = flow.index[first.node], flow.index[last]
    between = (1 << end) - (1 << start)
    if flow.barriers & between:
        return False
    return not any(flow.writes[node] & flow.storages[first.x] for node in flow.select(between))


def _pair(flow: Dataflow, products: Mapping[Node, _Product], tail: Node) -> tuple[Group, tuple[Node, str]] | None:
    """A gate and an up projection of one row that meet in act(gate) * up, which nobody else reads."""
    if tail.target is not aten.mul.Tensor or len(tail.all_input_nodes) != 2:
        return None
    for acted, up in (tail.args, tail.args[::-1]):
        name = _activation(acted)
        if name is None or not isinstance(acted, Node):
            continue
        gate = acted.args[0]
        if not (isinstance(gate, Node) and isinstance(up, Node)) or gate not in products or up not in products:
            continue
        pair, alone = (products[gate], products[up]), all(len(node.users) == 1 for node in (gate, up, acted))
        same = pair[0].x is pair[1].x and (pair[0].bias is None) == (pair[1].bias is None)
        same = same and len({node.meta.get("auxstream") for node in (gate, up, acted, tail)}) == 1
        same = same and len({node.meta["val"].dtype for node in (gate, up, acted, tail)}) == 1
        same = same and gate.meta["val"].shape == up.meta["val"].shape
        same = same and gate.meta["val"].numel() == gate.meta["val"].shape[-1]
        first = min(pair, key=lambda product: flow.index[product.node])
        if alone and same and _undisturbed(flow, first, tail):
            return pair, (tail, name)
    return None


def _activation(node: Any) -> str | None:
    if isinstance(node, Node) and node.target is aten.silu.default:
        return "silu"
    if isinstance(node, Node) and node.target is aten.gelu.default:
        return "gelu_tanh" if Call.of(node).arguments["approximate"] == "tanh" else None
    return None


# --- choosing ---------------------------------------------------------------------------------------------------------


def _judged(
    gm: GraphModule, groups: Sequence[Group], judge: Judge, activations: Mapping[Group, str] | None = None
) -> dict[Group, Times]:
    """Times of groups; of those that are alike the same. Absent where there are none."""
    classes: dict[Any, list[Group]] = {}
    for group in groups:
        x = group[0].x.meta["val"]
        sizes = tuple((tuple(p.weight.meta["val"].shape), p.weight.meta["val"].stride()) for p in group)
        key = (
            x.numel() // x.shape[-1],
            x.dtype,
            x.device,
            sizes,
            group[0].bias is None,
            (activations or {}).get(group),
        )
        classes.setdefault(key, []).append(group)
    works = [[_work(gm, group, key[-1]) for group in alike[:_MOST_CALLS]] for key, alike in classes.items()]
    if judge is measured:
        compile_ahead([calls[0] for calls in works])
    found: dict[Group, Times] = {}
    for alike, calls in zip(classes.values(), works, strict=True):
        times = judge(calls)
        if times is not None:
            found |= dict.fromkeys(alike, times)
    return found


def _work(gm: GraphModule, group: Group, activation: str | None) -> Work:
    """The call, with the graph's own weights and made-up activations."""
    x = group[0].x.meta["val"]
    weights = tuple(_attribute(gm, product.weight) for product in group)
    biases = tuple(_attribute(gm, product.bias) for product in group if product.bias is not None)
    like = torch.zeros(x.numel() // x.shape[-1], x.shape[-1], dtype=x.dtype, device=weights[0].device)
    return Work(like, weights, biases, activation)


def _attribute(gm: GraphModule, node: Node) -> Tensor:
    value: Any = gm
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return value.detach()


def _partition(group: Group, times: Mapping[Group, Times]) -> Iterator[Group]:
    """What becomes launches of ours: all together, or whichever win alone."""
    alone = [(product,) for product in group]
    known = all(part in times for part in (group, *alone))
    if known and len(group) > 1 and times[group].won:
        separately = sum(times[one].best for one in alone)
        if times[group].ours * _MARGIN < separately:
            yield group
            return
    yield from (one for one in alone if one in times and times[one].won)


# --- replacing --------------------------------------------------------------------------------------------------------


def _replace(group: Group, instead: dict[Node, Node]) -> None:
    """`instead`: what took a product's place; its input may be one that is gone."""
    first, x = group[0].node, instead.get(group[0].x, group[0].x)
    weights, biases = _in_front(group, first)
    new = derived(first, "products", skinny_linear(), (x, weights, biases))
    for number, product in enumerate(group):
        own = instead[product.node] = derived(product.node, "product", operator.getitem, (new, number))
        product.node.replace_all_uses_with(own)
        product.node.graph.erase_node(product.node)


def _replace_gated(pair: Group, tail: Node, name: str, instead: dict[Node, Node]) -> None:
    weights, biases = _in_front(pair, tail)
    x = instead.get(pair[0].x, pair[0].x)
    new = instead[tail] = derived(tail, "gated", gated_linear(), (x, *weights, biases, name))
    tail.replace_all_uses_with(new)
    acted = next(iter(pair[0].node.users))
    for node in (tail, acted, pair[0].node, pair[1].node):
        node.graph.erase_node(node)


def _in_front(group: Group, place: Node) -> tuple[list[Node], list[Node]]:
    """The weights and biases of a group, where a node at `place` can read them."""
    weights = [product.weight for product in group]
    biases = [product.bias for product in group if product.bias is not None]
    for node in (*weights, *biases):
        if place < node:
            place.prepend(node)
    return weights, biases


def _finished(gm: GraphModule, replaced: Sequence[Replaced], products: int) -> ProductsReport:
    if replaced:
        for node in reversed(list(gm.graph.nodes)):  # transposed views that nobody reads any more
            if not node.users and node.target in (aten.t.default, aten.transpose.int, aten.permute.default):
                gm.graph.erase_node(node)
        gm.graph.lint()
        gm.recompile()
    return ProductsReport(tuple(replaced), products)


def _names(group: Group) -> tuple[str, ...]:
    return tuple(product.node.name for product in group)


def _shape(group: Group) -> str:
    x = group[0].x.meta["val"]
    rows, widths = x.numel() // x.shape[-1], " + ".join(str(product.weight.meta["val"].shape[0]) for product in group)
    return f"[{rows}, {x.shape[-1]}] by {widths}"
