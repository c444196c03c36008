"""Where nodes lie in the model they were traced from, in the model's own words.

Enters: nodes of a traced graph. Leaves: dotted module paths, and a title for several nodes. Nothing else is read than
`meta["nn_module_stack"]`; a node without one has an empty path.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from torch.fx import Node


def module_path(node: Node) -> str:
    """The dotted path of the innermost module a node was traced in; subscripts and getattr calls become dots."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = str(list(stack.values())[-1][0])
    return re.sub(r"""\[['"]?(\w+)['"]?\]""", r".\1", path)


def common_path(nodes: Iterable[Node]) -> str:
    """The path of the innermost module that holds all nodes which lie in any."""
    return ".".join(_common([path.split(".") for node in nodes if (path := module_path(node))]))


def title(nodes: Sequence[Node]) -> str:
    """`layers.0.self_attn.{k_proj, v_proj}`: what the nodes' modules share, then where they part."""
    paths = list(dict.fromkeys(path for node in nodes if (path := module_path(node))))
    if not paths:
        return f"{nodes[0]}..{nodes[-1]}"
    parts = [path.split(".") for path in paths]
    shared = _common(parts)
    inner = list(dict.fromkeys(_first(part[len(shared) :]) for part in parts))
    while shared and shared[0] == "model":  # wrappers within wrappers
        del shared[0]
    if len(inner) == 1 or "" in inner:
        return ".".join(shared)
    return ".".join([*shared, f"{{{', '.join(inner)}}}"])


def _first(parts: Sequence[str]) -> str:
    """A module's name, with its number where it is one of a list."""
    return ".".join(parts[: 2 if len(parts) > 1 and parts[1].isdigit() else 1])


def _common(paths: Sequence[Sequence[str]]) -> list[str]:
    shared: list[str] = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return shared
