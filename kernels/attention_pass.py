"""Attention at one query per row, found in a traced graph and replaced by `auxstream::decode_attention`.

Enters: a graph. Leaves: the same graph in which such attention reads its caches as they lie, unless torch's own form is
as fast here; and a report of every attention that was met. Invariant: what is not understood to the last argument stays
as it is, and caches are read no later than anything that writes them afterwards.

Two forms are known, with keys and values that may be repeated over heads, `repeat_kv(x)` in transformers:

    scaled_dot_product_attention(q, repeat_kv(k), repeat_kv(v), mask)
    softmax(softcap * tanh(q @ repeat_kv(k).mT * scale / softcap) + mask) @ repeat_kv(v)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from . import attention_choice
from .attention import Work, compile_ahead, decode_attention, refusal, work_of
from .attention_choice import Choice
from .call import Call
from .dataflow import Dataflow
from .derive import derived

aten = torch.ops.aten

_RESHAPES: Final = (aten.reshape.default, aten.view.default, aten._unsafe_view.default)


@dataclass(frozen=True, slots=True)
class Site:
    """One attention of the graph, and what became of it."""

    node: str
    choice: Choice
    reason: str = ""
    """Why it was left as it was."""

    def __str__(self) -> str:
        return f"{self.node}: {self.choice}" + (f", {self.reason}" if self.reason else "")


@dataclass(frozen=True, slots=True)
class AttentionReport:
    """Every attention that was met, in graph order."""

    sites: tuple[Site, ...]

    @property
    def fused(self) -> int:
        return sum(site.choice == "own" for site in self.sites)

    def __str__(self) -> str:
        return "\n".join(map(str, self.sites)) or "no attention at one query per row"


@dataclass(frozen=True, slots=True)
class _Found:
    """An attention, taken apart."""

    q: Node
    k: Node
    v: Node
    """Keys and values, not repeated."""
    mask: Node | None
    scale: float
    softcap: float | None
    inner: tuple[Node, ...]
    """What only led to the result, from the last node back."""

    def work(self) -> Work:
        q, k, v = (node.meta["val"] for node in (self.q, self.k, self.v))
        return work_of(q, k, v, None if self.mask is None else self.mask.meta["val"], self.scale, self.softcap)

    def with_new(self, new: Mapping[Node, Node]) -> _Found:
        """With what nodes became that were replaced."""
        mask = None if self.mask is None else new.get(self.mask, self.mask)
        return replace(self, q=new.get(self.q, self.q), k=new.get(self.k, self.k), v=new.get(self.v, self.v), mask=mask)


class _No(Exception):
    """Why an attention is not one of the known forms."""


def fuse_decode_attention(
    gm: GraphModule, choose: Callable[[Work], Choice] = attention_choice.choose
) -> AttentionReport:
    """Replace attention of one query per row, in place: before the marker and before `fuse_elementwise`.

    Args:
        gm: an ATen graph whose nodes have `meta["val"]`; recompiled if anything changed.
        choose: says for a layout what to run; by default what is fastest, measured once per layout and card.

    Returns:
        a line for every attention, with the reason where it stays.
    """
    flow = Dataflow.of(gm)
    met = {node: _read(flow, node, read) for node in flow.nodes if (read := _reader_of(node)) is not None}
    compile_ahead(found.work() for found in met.values() if isinstance(found, _Found))
    sites, new = list[Site](), dict[Node, Node]()
    for node, found in met.items():
        if isinstance(found, Site):
            sites.append(found)
            continue
        choice = choose(found.work())
        sites.append(Site(node.name, choice, "torch's own is as fast here" if choice == "kept" else ""))
        if choice != "kept":
            new[node] = _replace(node, found.with_new(new), choice)
    if new:
        gm.recompile()
    return AttentionReport(tuple(sites))


def _read(flow: Dataflow, node: Node, read: Callable[[Node], _Found]) -> _Found | Site:
    """What the node computes, or why it stays as it is."""
    try:
        found = read(node)
        _require_unchanged(flow, node, found)
    except _No as why:
        return Site(node.name, "kept", str(why))
    return found


def _reader_of(node: Node) -> Callable[[Node], _Found] | None:
    """How to read the node if it is the end of an attention with one query per row."""
    value = node.meta.get("val")
    if node.op != "call_function" or not isinstance(value, Tensor) or value.dim() != 4:
        return None
    queries: Any = value.shape[2]
    if not isinstance(queries, int) or queries != 1:
        return None
    if node.target is aten.scaled_dot_product_attention.default:
        return _of_torch
    return _by_hand if node.target is aten.matmul.default and _softmax_before(node) is not None else None


def _replace(node: Node, found: _Found, choice: Choice) -> Node:
    tensors = (found.q, found.k, found.v, found.mask)
    if choice == "own":
        new = derived(node, "decode", decode_attention(), (*tensors, found.scale, found.softcap))
    else:
        assert found.softcap is None
        target = aten.scaled_dot_product_attention.default
        new = derived(node, "grouped", target, tensors, {"scale": found.scale, "enable_gqa": True})
    node.replace_all_uses_with(new)
    for dead in found.inner:
        if not dead.users:
            node.graph.erase_node(dead)
    return new


def _require_unchanged(flow: Dataflow, node: Node, found: _Found) -> None:
    """Of copies nobody minds what happens to the original; the caches themselves are read by the last node."""
    first = min(flow.index[inner] for inner in found.inner)
    for source in (found.q, found.k, found.v, found.mask):
        for storage in flow.storages[source] if source is not None else ():
            for writer in flow.writers.get(storage, ()):
                if first < flow.index[writer] < flow.index[node] and writer is not flow.owner[storage]:
                    raise _No(f"{writer.name} writes what {found.inner[-1].name} has read, before it is used")
    if any(flow.barriers >> position & 1 for position in range(first, flow.index[node])):
        raise _No("between its parts lies an op that may do anything")


# --- what is known ----------------------------------------------------------------------------------------------------


def _of_torch(node: Node) -> _Found:
    given = Call.of(node).arguments
    if given["dropout_p"]:
        raise _No("dropout")
    if given["is_causal"]:
        raise _No("is_causal, by which the one query sees the first key alone")
    return _found(node, given["query"], given["key"], given["value"], given["attn_mask"], given["scale"], None, ())


def _by_hand(node: Node) -> _Found:
    """From the second product back to the first."""
    softmax = _softmax_before(node)
    assert softmax is not None
    inner: list[Node] = [*_between(node.args[0], softmax), softmax]
    at: Any = softmax.args[0]
    dims = softmax.meta["val"].dim()
    if softmax.args[1] not in (-1, dims - 1):
        raise _No("a softmax over something else than keys")
    mask: Any = None
    if _is(at, aten.add.Tensor) and not at.kwargs:
        inner.append(at)
        at, mask = at.args
    softcap: float | None = None
    if (capped := _scaled(at)) is not None and _is(at.args[0], aten.tanh.default):
        tanh: Any = at.args[0]
        divided: Any = tanh.args[0]
        if not _is(divided, aten.div.Tensor) or divided.args[1] != capped:
            raise _No("a tanh that is no softcap")
        softcap = capped
        inner += [at, tanh, divided]
        at = divided.args[0]
    scale = 1.0
    if (factor := _scaled(at)) is not None:
        scale = factor
        inner.append(at)
        at = at.args[0]
    if not _is(at, aten.matmul.default):
        raise _No(f"{softmax.name} is not the softmax of a product")
    inner.append(at)
    q, turned = at.args
    if not _is(turned, aten.transpose.int) or {turned.args[1] % 4, turned.args[2] % 4} != {2, 3}:
        raise _No(f"{at.name} is not a product with transposed keys")
    inner.append(turned)
    if any(len(part.users) > 1 for part in inner):
        raise _No("scores or weights that are used elsewhere")
    return _found(node, q, turned.args[0], node.args[1], mask, scale, softcap, inner)


def _found(
    node: Node, q: Any, k: Any, v: Any, mask: Any, scale: Any, softcap: float | None, inner: Sequence[Node]
) -> _Found:
    if not all(isinstance(x, Node) and isinstance(x.meta.get("val"), Tensor) for x in (q, k, v)):
        raise _No("queries, keys or values that are no tensors")
    if mask is not None and not (isinstance(mask, Node) and isinstance(mask.meta.get("val"), Tensor)):
        raise _No("a mask that is no tensor")
    shapes = [size for x in (q, k, v, mask) if x is not None for size in x.meta["val"].shape]
    if not all(isinstance(size, int) for size in shapes) or not isinstance(scale, (float, int, type(None))):
        raise _No("sizes that are not numbers")
    (keys, key_copies, group), (values, value_copies, same) = _unrepeated(k), _unrepeated(v)
    if group != same:
        raise _No(f"keys repeated {group} times and values {same} times")
    scale = q.meta["val"].shape[-1] ** -0.5 if scale is None else float(scale)
    found = _Found(q, keys, values, mask, scale, softcap, (node, *inner, *value_copies, *key_copies))
    if why := refusal(found.work()):
        raise _No(why)
    return found


def _unrepeated(node: Node) -> tuple[Node, list[Node], int]:
    """What is repeated, the nodes that repeat it from the last one back, and how often."""
    shape = tuple(node.meta["val"].shape)
    if len(shape) != 4:
        return node, [], 1
    if _is(node, aten.repeat_interleave.self_int):
        given = Call.of(node).arguments
        if given["dim"] in (1, -3) and isinstance(given["repeats"], int):
            return given["self"], [node], given["repeats"]
        return node, [], 1
    passed = [node]
    at: Any = node
    while _is(at, aten.clone.default, aten.contiguous.default, *_RESHAPES):
        at = at.args[0]
        passed.append(at)
    if not _is(at, aten.expand.default) or not _is(at.args[0], aten.unsqueeze.default):
        return node, [], 1
    inserted: Node = at.args[0]
    source: Any = inserted.args[0]
    value, wide = source.meta["val"], tuple(at.meta["val"].shape)
    if value.dim() != 4 or len(wide) != 5 or Call.of(inserted).arguments["dim"] not in (2, -3):
        return node, [], 1
    batch, heads, keys, d = value.shape
    group = wide[2]
    if wide != (batch, heads, group, keys, d) or shape != (batch, heads * group, keys, d):
        return node, [], 1
    if any(tuple(x.meta["val"].shape) not in (shape, wide) for x in passed):
        return node, [], 1
    return source, [*passed, inserted], group


def _softmax_before(node: Node) -> Node | None:
    at: Any = node.args[0]
    while _is(at, aten.to.dtype, aten.dropout.default, aten.type_as.default):
        if at.target is aten.dropout.default and at.args[2] and at.args[1]:
            return None
        at = at.args[0]
    return at if _is(at, aten.softmax.int, aten._softmax.default) else None


def _between(at: Any, end: Node) -> Sequence[Node]:
    found = list[Node]()
    while at is not end:
        found.append(at)
        at = at.args[0]
    return found


def _scaled(at: Any) -> float | None:
    """The number that something is multiplied by."""
    factor = at.args[1] if _is(at, aten.mul.Tensor, aten.mul.Scalar) else None
    return float(factor) if isinstance(factor, float | int) else None


def _is(node: Any, *targets: Any) -> bool:
    return isinstance(node, Node) and node.target in targets
