"""Which ops a graph is split at: attention, and those that the user names.

Enters: a node, or a graph, and names of ops. Leaves: whether it is split at; its names; an error for a name that no op
has. Invariant: nothing is guessed from how an op of the user's is called.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from torch._ops import HigherOrderOperator, OpOverload
from torch.fx import GraphModule, Node

from ..runtime.errors import CaptureError

ATTENTION: Final = (
    "aten.scaled_dot_product_",
    "aten._scaled_dot_product_",
    "aten._flash_attention_",
    "aten._efficient_attention_",
    "aten._cudnn_attention_",
    "higher_order.flex_attention",
    "auxstream.decode_attention",
)
"""How the names of ops begin that are split at by default."""


def splits_at(node: Node, names: Sequence[str] = ()) -> bool:
    """Whether a node is attention, or an op of `names`."""
    known = op_names(node)
    return bool(known) and (known[0].startswith(ATTENTION) or not set(known).isdisjoint(map(_dotted, names)))


def op_names(node: Node) -> tuple[str, ...]:
    """The names an op may be called by, the short one first; nothing for a node that is no op."""
    target = node.target
    if isinstance(target, OpOverload):
        name = _dotted(target._schema.name)
        return name, f"{name}.{target._overloadname}"
    return (f"higher_order.{target.name()}",) if isinstance(target, HigherOrderOperator) else ()


def ops_of(gm: GraphModule) -> dict[str, str]:
    """The ops of a graph: by every name one may be called by, the short one."""
    return {name: names[0] for node in gm.graph.nodes for names in [op_names(node)] for name in names}


def refuse_unknown(names: Iterable[str], known: Mapping[str, str]) -> None:
    """Raises CaptureError for names that are none of `known`, as `ops_of` gives them."""
    for name in names:
        if _dotted(name) not in known:
            candidates = sorted(set(known.values()), key=lambda op: (op.startswith("aten."), op))
            raise CaptureError(
                f"split_ops names {name!r}",
                expected="an op of the traced graph, one of " + ", ".join(candidates),
                came="a name that none of them has",
                remedy="correct the name, or take it out",
            )


def keep_whole(gm: GraphModule, names: Sequence[str] = ()) -> None:
    """Keep fusion off the ops that the graph will be split at."""
    for node in gm.graph.nodes:
        if splits_at(node, names):
            node.meta["skip_mlir_fusion"] = True


def _dotted(name: str) -> str:
    return name.replace("::", ".")
