"""Which nodes of a graph are a router, read off their structure.

Enters: a dataflow and a node that selects experts. Leaves: `Match`: the op's tensors as nodes, its `Rules`, and the
nodes that the op takes the place of; or `Unmatched`, with the reason. Nothing is changed. Invariant: nobody but the
match itself looks at what it computes on the way; only its choices and their weights are seen outside.

Read from the selection back to the hidden states, then forward to the weights. Where reading stops, the rest of the
graph stays as it is: a norm that others share is not taken, nor is what happens to the weights beyond what the op does.
How groups are masked is not read node by node: what lies between choice and mask must be closed in itself, the two
selections in it tell the groups, and that it does what the op does is for the guard to find out (`router_pass.py`).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from .call import Call, aten
from .dataflow import Dataflow
from .router import Rules, Tensors, refusal
from .router_closed import Match, Unmatched, require_closed
from .router_forms import (
    CASTS,
    DIVISIONS,
    RESHAPING,
    TIMES,
    is_exact_cast,
    is_plain,
    norm_of,
    number_of,
    rank_of,
    value_of,
)
from .shapes import static


def match(flow: Dataflow, selection: Node) -> Match:
    """The router that ends in this selection; raises Unmatched."""
    reader = _Reader()
    reader.select(selection)
    reader.back()
    reader.forward()
    found = reader.found(flow)
    require_closed(flow, found)
    return found


class _Reader:
    """What has been read so far. `taken` is a match's nodes, in no order."""

    def __init__(self) -> None:
        self.taken = dict[Node, None]()
        self.bias: Node | None = None
        self.scale: Node | None = None
        self.expert_scale: Node | None = None
        self.groups = self.kept = 1
        self.eps: float | None = None
        self.factor = 1.0
        self.terms = dict[str, Any]()

    def select(self, selection: Node) -> None:
        """The selection, and what is made of it."""
        if selection.target is not aten.topk.default:
            raise Unmatched(f"{selection.target} selects, not topk")
        call = Call.of(selection)
        if rank_of(call.source) != 2 or call.arguments["dim"] not in (-1, 1) or not call.arguments["largest"]:
            raise Unmatched("topk is not of the largest of each row of [T, E]")
        if not isinstance(call.arguments["k"], int):
            raise Unmatched("topk is of a number of experts that is not known")
        self.selection, self.top_k = selection, call.arguments["k"]
        self.take(selection)
        elements = {key: [u for u in selection.users if u.args[1:] == (key,)] for key in (0, 1)}
        if len(elements[1]) != 1 or len(elements[0]) > 1 or len(selection.users) != sum(map(len, elements.values())):
            raise Unmatched("its results are not taken apart once each")
        self.index = elements[1][0]
        self.values = elements[0][0] if elements[0] and elements[0][0].users else None
        for element in (*elements[0], *elements[1]):
            self.take(element)

    def take(self, node: Node) -> Call:
        self.taken[node] = None
        return Call(node, {}) if node.target is operator.getitem else Call.of(node)

    def private(self, node: Node) -> bool:
        """Whether only nodes of the match use it."""
        return all(user in self.taken for user in node.users)

    # --- from the selection back to the hidden states

    def back(self) -> None:
        node = self.plain(Call.of(self.selection).source)
        if node.target is aten.masked_fill.Scalar:
            call = self.take(node)
            if call.arguments["value"] != -math.inf:
                raise Unmatched(f"experts outside of the groups count {call.arguments['value']}, not -inf")
            node = self.plain(call.source)
            self.mask(call.arguments["mask"], node)
        if node.target is aten.add.Tensor:
            node = self.biased(node)
        self.scores, self.late = node, False
        if node.target is aten.softmax.int or node.target is aten.sigmoid.default:
            call = self.take(node)
            self.softmax = node.target is aten.softmax.int
            if self.softmax and call.arguments["dim"] not in (-1, 1):
                raise Unmatched("softmax is not over experts")
            value = value_of(node)
            if value is None or value.dtype is not torch.float32:
                raise Unmatched("scores are not float32")
            logits = self.wide(self.plain(call.source))
        else:
            logits, self.softmax, self.late = self.wide(node), True, True
            if self.bias is not None or self.kept < self.groups or not self.softmax_of_values():
                raise Unmatched(f"experts are chosen by {node.target}, not by a softmax or a sigmoid of logits")
        if logits.target is not aten.linear.default or Call.of(logits).arguments["bias"] is not None:
            raise Unmatched(f"logits are {logits.target}, not a product without a bias")
        call = self.take(logits)
        product, self.weight = value_of(logits), self.wide(call.arguments["weight"])
        if product is None or product.dim() != 2:
            raise Unmatched("logits are not [T, E]")
        self.product = product.dtype
        self.hidden = self.inputs(call.source)

    def biased(self, node: Node) -> Node:
        call = self.take(node)
        one, other = call.source, call.arguments["other"]
        if call.arguments["alpha"] != 1 or not isinstance(other, Node):
            raise Unmatched("what is added to scores is no bias per expert")
        if self.plain_source(one) is None:
            one, other = other, one
        self.bias = self.vector(other)
        if self.bias is None:
            raise Unmatched("what is added to scores is no bias per expert")
        return self.plain(one)

    def plain_source(self, node: Node) -> Node | None:
        """The scores that a node is but a name for, if any."""
        while is_plain(node):
            node = Call.of(node).source
        return node if node.target in (aten.softmax.int, aten.sigmoid.default) else None

    def mask(self, mask: Any, choice: Node) -> None:
        """Everything between the choice and the mask; groups from the two selections in it."""
        inside, pending = dict[Node, None](), [mask]
        while pending:
            node = pending.pop()
            if node is choice or node in inside:
                continue
            if not isinstance(node, Node) or node.op != "call_function":
                raise Unmatched(f"groups are masked by {node}, which is not computed from what experts are chosen by")
            inside[node] = None
            pending += node.all_input_nodes
        selections = [Call.of(node) for node in inside if node.target is aten.topk.default]
        experts = [call for call in selections if rank_of(call.source) == 3]
        ranked = [call for call in selections if rank_of(call.source) == 2]
        if len(experts) != 1 or len(ranked) != 1 or len(selections) != 2:
            raise Unmatched("groups are not ranked by one selection in each of them and one among them")
        if experts[0].arguments["k"] != 2:
            raise Unmatched(f"groups are ranked by their {experts[0].arguments['k']} best experts, not by two")
        self.groups, self.kept = experts[0].tensor("self").shape[1], ranked[0].arguments["k"]
        if not static((self.groups, self.kept)):
            raise Unmatched("groups are not of a known number")
        self.taken |= inside

    def softmax_of_values(self) -> bool:
        """Whether the chosen logits become weights by a softmax: as a softmax of all logits, renormalised."""
        users = list(self.values.users) if self.values is not None else []
        if len(users) != 1 or users[0].target is not aten.softmax.int:
            return False
        if Call.of(users[0]).arguments["dim"] not in (-1, 1):
            return False
        value = value_of(users[0])
        return value is not None and value.dtype is torch.float32

    def inputs(self, given: Node) -> Node:
        """The hidden states, behind as much of `((norm) * scale) * factor` as nobody else uses."""
        node = self.wide(given)
        if given is not node and not self.private(given):
            return node
        if self.private(node) and (term := number_of(node)) is not None:
            self.factor = term
            node = self.take(node).source
        if self.private(node) and node.target is aten.mul.Tensor:
            call = Call.of(node)
            for one, other in ((call.source, call.arguments["other"]), (call.arguments["other"], call.source)):
                if rank_of(one) == 2 and rank_of(other) == 1:
                    self.take(node)
                    self.scale, node = self.vector(other), one
                    break
        norm = norm_of(node)
        if norm is not None and all(u in norm.nodes or u in self.taken for n in norm.nodes for u in n.users):
            self.eps, node = norm.eps, norm.source
            self.taken |= dict.fromkeys(norm.nodes)
        return node

    def plain(self, node: Node) -> Node:
        """Behind views and casts that change neither shape nor type."""
        while is_plain(node):
            node = self.take(node).source
        return node

    def wide(self, node: Node) -> Node:
        """Behind casts that lose nothing."""
        node = self.plain(node)
        while is_exact_cast(node):
            node = self.plain(self.take(node).source)
        return node

    def vector(self, node: Node) -> Node | None:
        """The vector that [1, E] or a wider type was made of."""
        value = value_of(node)
        while value is not None and node.op == "call_function":
            if not (is_exact_cast(node) or (node.target in RESHAPING and set(value.shape[:-1]) <= {1})):
                break
            node = self.take(node).source
            value = value_of(node)
        return node if value is not None and value.dim() == 1 else None

    # --- from the selection forward to the weights

    def forward(self) -> None:
        self.weights = self.first_weights()
        self.out = torch.float32
        self.renormalised, self.smallest, self.routed_scale = self.late, 0.0, None
        steps: list[Callable[[Node, list[Node]], Node | None]] = [
            self.divided, self.scaled, self.scaled_by_expert, self.cast,
        ]  # fmt: skip
        while steps:
            step = steps.pop(0)
            after = step(self.weights, list(self.weights.users))
            self.weights = self.names(after or self.weights)

    def first_weights(self) -> Node:
        """The scores of the experts that were chosen."""
        if self.late:
            assert self.values is not None
            (softmax,) = self.values.users
            self.take(softmax)
            return softmax
        gathers = [user for user in self.index.users if self._gathers(user)]
        found = [*gathers, *([self.values] if self.values is not None else [])]
        if len(found) != 1:
            raise Unmatched(f"scores of the chosen experts are taken {len(found)} times, not once")
        if not gathers and (self.bias is not None or self.kept < self.groups):
            raise Unmatched("weights are what experts were chosen by, not scores")
        self.take(found[0])
        return found[0]

    def _gathers(self, user: Node) -> bool:
        if user.target is not aten.gather.default or Call.of(user).arguments["dim"] not in (-1, 1):
            return False
        call = Call.of(user)
        source = call.source
        while is_plain(source):
            source = Call.of(source).source
        if call.arguments["index"] is not self.index or source is not self.scores:
            return False
        self.plain(call.source)
        return True

    def names(self, node: Node) -> Node:
        """What a node's only user but names anew."""
        while len(node.users) == 1 and is_plain(user := next(iter(node.users))):
            self.take(user)
            node = user
        return node

    def divided(self, node: Node, users: list[Node]) -> Node | None:
        sums = [user for user in users if user.target is aten.sum.dim_IntList]
        ends = [user for user in users if user.target in DIVISIONS and user.args[0] is node]
        if self.late or len(users) != 2 or len(sums) != 1 or len(ends) != 1:
            return None
        call, by = Call.of(sums[0]), sums[0]
        if list(call.arguments["dim"] or ()) not in ([-1], [1]) or not call.arguments["keepdim"]:
            return None
        if call.arguments["dtype"] not in (None, torch.float32):
            return None
        smallest, added = 0.0, [user for user in by.users if user is not ends[0]]
        if len(by.users) == 1 and len(added) == 1 and added[0].target is aten.add.Tensor:
            term = Call.of(added[0]).arguments
            if not isinstance(term["other"], int | float) or term["alpha"] != 1:
                return None
            smallest, by = float(term["other"]), added[0]
        if list(by.users) != [ends[0]] or ends[0].args[1] is not by:
            return None
        self.renormalised, self.smallest = True, smallest
        self.taken |= dict.fromkeys((sums[0], by, ends[0]))
        return ends[0]

    def scaled(self, node: Node, users: list[Node]) -> Node | None:
        if len(users) != 1 or (term := number_of(users[0])) is None:
            return None
        self.routed_scale = term
        self.take(users[0])
        return users[0]

    def scaled_by_expert(self, node: Node, users: list[Node]) -> Node | None:
        if len(users) != 1 or users[0].target not in TIMES or node not in users[0].args[:2]:
            return None
        (other,) = [argument for argument in users[0].args[:2] if argument is not node] or [None]
        if not isinstance(other, Node) or other.target is not aten.index.Tensor or list(other.users) != users:
            return None
        picked = other.args[1]
        if not isinstance(picked, list | tuple) or list(picked) != [self.index] or rank_of(other.args[0]) != 1:
            return None
        self.take(other)
        self.take(users[0])
        self.expert_scale = self.vector(Call.of(other).source)
        return users[0]

    def cast(self, node: Node, users: list[Node]) -> Node | None:
        value = value_of(users[0]) if len(users) == 1 else None
        if value is None or users[0].target not in CASTS or users[0].args[0] is not node:
            return None
        self.out = value.dtype
        self.take(users[0])
        return users[0]

    # --- the result

    def found(self, flow: Dataflow) -> Match:
        rules = Rules(
            product=self.product, softmax=self.softmax, top_k=self.top_k, out=self.out, eps=self.eps,
            factor=self.factor, groups=self.groups, kept=self.kept, renormalised=self.renormalised,
            smallest=self.smallest, routed_scale=1.0 if self.routed_scale is None else self.routed_scale,
        )  # fmt: skip
        nodes = tuple(sorted(self.taken, key=flow.index.__getitem__))
        found = Match(
            self.selection, self.hidden, self.weight, self.scale, self.bias, self.expert_scale, rules, self.index,
            self.weights, nodes,
        )  # fmt: skip
        values = [None if node is None else value_of(node) for node in found.tensors]
        if values[0] is None or values[1] is None:
            raise Unmatched("hidden states or weight are no tensors")
        if why := refusal(Tensors(values[0], values[1], *values[2:]), rules):
            raise Unmatched(why)
        return found
