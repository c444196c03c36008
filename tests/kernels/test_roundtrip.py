"""FX -> MLIR -> FX without fusions is the identity, on any graph. What is compared is plain data, taken beforehand."""

from __future__ import annotations

import copy
import operator
import random
from collections.abc import Callable
from typing import Any

import pytest
import tiny_models
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.fx import Graph, GraphModule, Node, symbolic_trace
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from auxstream.capture.mark import mark_multi_stream_moe_shared_experts
from auxstream.capture.schedule import insert_regions
from auxstream.capture.trace import trace
from auxstream.kernels.mlir import LoweringError
from auxstream.kernels.module import Translation, to_fx, to_mlir
from auxstream.runtime.handoff_ops import REGION_OPS


def shown(argument: Any) -> Any:
    """An argument with names for nodes, and the types of all containers."""
    match argument:
        case Node():
            return "node", argument.name
        case slice():
            return "slice", shown(argument.start), shown(argument.stop), shown(argument.step)
        case dict():
            return type(argument).__name__, [(key, shown(value)) for key, value in argument.items()]
        case list() | tuple():
            return type(argument).__name__, [shown(value) for value in argument]
        case _:
            return type(argument).__name__, repr(argument)


def facts(graph: Graph) -> list[Any]:
    """All there is to say of a graph's nodes, in order."""
    return [
        {
            "name": node.name,
            "op": node.op,
            "target": node.target if isinstance(node.target, str) else id(node.target),
            "args": shown(node.args),
            "kwargs": shown(node.kwargs),
            "type": node.type,
            "users": {user.name for user in node.users},
            "inputs": [other.name for other in node.all_input_nodes],
            "meta": {key: id(value) for key, value in node.meta.items()},
        }
        for node in graph.nodes
    ]


def there_and_back(gm: GraphModule) -> GraphModule:
    """Replace `gm`'s graph by its translation's, which must equal it and share nothing with it."""
    before, old, meta = facts(gm.graph), gm.graph, dict(gm.meta)
    translation = to_mlir(gm)
    assert facts(gm.graph) == before, "translating changes nothing"
    new = to_fx(translation, gm)
    assert facts(new) == before
    assert not set(new.nodes) & set(old.nodes)
    assert (new._codegen, new._tracer_cls) == (old._codegen, old._tracer_cls)
    gm.graph = new
    assert new.owning_module is gm
    assert gm.meta == meta
    new.lint()
    if not len(new.nodes):
        return gm
    more = new.create_node("call_function", torch.relu, name=next(iter(new.nodes)).name)
    assert more.name not in {node["name"] for node in before}, "names stay unique"
    new.erase_node(more)
    return gm


def same_bits(one: Any, other: Any) -> None:
    for a, b in zip(pytree.tree_leaves(one), pytree.tree_leaves(other), strict=True):
        if isinstance(a, Tensor):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
            assert torch.equal(*(t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)))
        else:
            assert a == b


def check_by_running(gm: GraphModule, *calls: tuple[Any, ...]) -> None:
    reference = copy.deepcopy(gm)
    there_and_back(gm)
    with torch.no_grad():
        for call in calls:
            one, other = copy.deepcopy(call), copy.deepcopy(call)
            same_bits(gm(*one), reference(*other))
            same_bits(one, other)
    same_bits(gm.state_dict(), reference.state_dict())
    same_bits(dict(gm.named_buffers()), dict(reference.named_buffers()))


# --- real models ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", tiny_models.NAMES)
@pytest.mark.parametrize("regions", [False, True])
def test_a_decode_step(name: str, regions: bool) -> None:
    gm = tiny_models.decode_step(name).graph_module
    if regions:
        assert insert_regions(gm)
        assert {node.target for node in gm.graph.nodes} >= set(REGION_OPS)
    check_by_running(gm, *(tiny_models.inputs(position=position) for position in range(3)))


# --- graphs from export -----------------------------------------------------------------------------------------------


@torch.library.custom_op("auxstream_test::write_cache", mutates_args=("cache",))
def write_cache(cache: Tensor, values: Tensor, at: int) -> None:
    cache[at] = values


@write_cache.register_fake
def _(cache: Tensor, values: Tensor, at: int) -> None:
    return None


class Everything(nn.Module):
    """Views, in-place ops, several outputs, constants, custom ops that write, and results of every structure."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(12.0).reshape(3, 4))
        self.register_buffer("cache", torch.zeros(5, 4))

    def forward(self, input: Tensor, max: dict[str, Tensor], *rest: Tensor, lambda_: Tensor) -> dict[str, Any]:
        values, indices = input.topk(2, dim=-1)
        first, second = (input @ self.weight.t()).chunk(2, dim=-1)[0], torch.arange(3)
        scaled = input.clone().mul_(self.weight[0]).add_(max["bias"])
        write_cache(self.cache, scaled[0], 2)
        self.cache.index_copy_(0, torch.tensor([1]), scaled[1:2])
        picked = torch.index_put(input, (indices[:, 0] % 2,), values.sum(-1, keepdim=True))
        return {
            "a": (scaled[:, ::2], [picked, None, 3]),
            "b": torch.cat([first, first, second.to(first)[:2, None]], dim=1),
            "same": torch.where(values > values, values, values),
            "kind": (input.to(torch.float64), torch.complex(input, input), rest[0] + lambda_),
        }


def test_export() -> None:
    x, bias = torch.randn(3, 4), {"bias": torch.ones(4)}
    program = torch.export.export(Everything(), (x[:2].clone(), bias, x), {"lambda_": x}, strict=False)
    gm = program.module(check_guards=False)
    assert isinstance(gm, GraphModule)
    names = [node.name for node in gm.graph.nodes]
    reference = copy.deepcopy(gm)
    there_and_back(gm)
    assert [node.name for node in gm.graph.nodes] == names
    same_bits(gm(x[:2].clone(), bias, x, lambda_=x), reference(x[:2].clone(), bias, x, lambda_=x))
    same_bits(gm.cache, reference.cache)
    assert gm.cache[:3].any(), "the caches were written"


def test_dynamic_sizes() -> None:
    class Grows(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
            n = x.shape[0] * 2
            flat = x.reshape(-1, 2).expand(n, 2)
            return flat, flat.new_zeros(n + 1, x.shape[0]), y[: x.shape[0]], torch.cat([x, x])[1:n]

    batch = Dim("batch", min=2, max=32)
    shapes = {"x": {0: batch}, "y": {0: Dim("other", min=40)}}
    gm = torch.export.export(Grows(), (torch.randn(3, 4), torch.randn(50)), dynamic_shapes=shapes).module()
    assert isinstance(gm, GraphModule)
    assert any(isinstance(node.meta.get("val"), torch.SymInt) for node in gm.graph.nodes)
    check_by_running(gm, *((torch.randn(n, 4), torch.randn(50)) for n in (3, 2, 7)))


def test_higher_order_ops() -> None:
    class Branches(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cond(x.sum() > 0, lambda x: x.sin() + 1, lambda x: x.cos(), (x,))

    gm = torch.export.export(Branches(), (torch.ones(3),)).module()
    assert isinstance(gm, GraphModule)
    assert any(isinstance(node.target, torch._ops.HigherOrderOperator) for node in gm.graph.nodes)
    check_by_running(gm, (torch.ones(3),), (-torch.ones(3),))


DTYPES = [
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.uint16, torch.uint32, torch.uint64, torch.int64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex32, torch.complex64, torch.complex128),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_every_dtype(dtype: torch.dtype) -> None:
    class Turns(nn.Module):
        def forward(self, x: Tensor) -> list[Tensor]:
            return [x.t().reshape(4, 1, 2), x[:0], x[0, 0], x.view(torch.uint8)]

    check_by_running(trace(Turns(), (torch.zeros(2, 4, dtype=dtype),)).graph_module, (torch.ones(2, 4).to(dtype),))


# --- graphs of other kinds --------------------------------------------------------------------------------------------


class Modules(nn.Module):
    """call_module, call_method and get_attr nodes without metadata, defaults, and arguments of every structure."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Dropout(0.0)])
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor, y: Tensor | None = None, *, flag: bool = True) -> Any:
        for layer in self.layers:
            x = layer(x)
        x.add_(self.scale)
        parts = x.split([1, 3], dim=-1)
        both = torch.einsum("ij,kj->ik", x, x)
        named = torch.nn.functional.pad(x, pad=(1, 1), mode="constant", value=0.5)
        return {"x": (x, parts[1], None), "all": [torch.stack((x, x, x), dim=0)[:, 1:, ...], both, named, y, "text"]}


def test_modules_and_methods() -> None:
    check_by_running(symbolic_trace(Modules()), (torch.randn(3, 4),), (torch.randn(3, 4), torch.ones(2)))


def test_empty_graphs() -> None:
    assert not len(there_and_back(GraphModule({}, Graph())).graph.nodes)
    alone = Graph()
    alone.output(None)
    assert there_and_back(GraphModule({}, alone))() is None
    unused = Graph()
    unused.placeholder("x")
    unused.output(())
    assert there_and_back(GraphModule({}, unused))(1) == ()


def test_odd_names_and_targets() -> None:
    graph = Graph()
    x = graph.placeholder("x")
    x.name = "max"  # as export does: the namespace would not choose it

    def quoting(value: Tensor) -> Tensor:
        return value + 1

    quoting.__name__ = 'a "quoted" \\ name\nwith lines, é and \x00'
    odd = graph.call_function(quoting, (x,), name="_0")
    late = graph.create_node("placeholder", "late", (), {}, name="late_3")  # behind a call
    done = graph.call_function(operator.add, (odd, late), name="add_7")
    done.name = "not an identifier"
    done.meta["anything"] = {"at": [1, "all"]}
    graph.output(done)
    gm = GraphModule({}, graph)
    before = facts(graph)
    new = to_fx(to_mlir(gm), gm)
    assert facts(new) == before


def test_what_is_no_graph_is_refused() -> None:
    twice, behind = Graph(), Graph()
    twice.placeholder("x")
    twice.placeholder("y").name = "x"
    twice.output(None)
    behind.output(None)
    behind.placeholder("x")
    for graph in (twice, behind):
        with pytest.raises(LoweringError, match="cannot be run"):
            to_mlir(GraphModule({}, graph))


def anything(*args: Any, **kwargs: Any) -> Any:
    return args, kwargs


class RandomGraph:
    """Calls whose arguments nest nodes, repeats included, in whatever FX allows."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        self.graph = Graph()
        self.nodes = [self.graph.placeholder(f"x{i}") for i in range(self.draw.randint(1, 3))]
        for _ in range(self.draw.randint(1, 8)):
            self.nodes.append(self.call())
        self.graph.output(self.argument(3))

    def call(self) -> Node:
        op = self.draw.choice(["call_function", "call_function", "call_method", "get_attr"])
        args = tuple(self.argument(3) for _ in range(self.draw.randint(0, 3)))
        kwargs = {name: self.argument(3) for name in self.draw.sample("abc", self.draw.randint(0, 2))}
        target = anything if op == "call_function" else self.draw.choice(["relu", "a.b"])
        made = self.graph.create_node(op, target, *((), {}) if op == "get_attr" else (args, kwargs))
        if self.draw.random() < 0.8:
            made.meta["val"] = self.draw.choice([None, 1, 1.5, True, (), (torch.ones(2), [3]), torch.ones(0, 2), "x"])
        return made

    def argument(self, depth: int) -> Any:
        draw = self.draw.random()
        if draw < 0.4:
            return self.draw.choice(self.nodes)
        if draw < 0.6 or not depth:
            return self.draw.choice([None, True, 7, 0.5, "text", torch.bfloat16, torch.device("cpu"), ...])
        parts = [self.argument(depth - 1) for _ in range(3)]
        return self.draw.choice(
            [parts, parts[:1], [], tuple(parts), (), dict(zip("abc", parts, strict=True)), slice(*parts)]
        )


@pytest.mark.parametrize("block", range(4))
def test_any_arguments(block: int) -> None:
    for seed in range(50 * block, 50 * block + 50):
        graph = RandomGraph(seed).graph
        gm = GraphModule({}, Graph())
        gm._graph = graph  # never run, so never compiled: `relu` and `a.b` are attributes of nothing
        before = facts(graph)
        assert facts(to_fx(to_mlir(gm), gm)) == before, f"seed {seed}"


# --- the comparison notices -------------------------------------------------------------------------------------------


def a_graph() -> GraphModule:
    class Mixes(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
            return (x - y).relu(), torch.cat([x, y, x]), x * 2

    return trace(Mixes(), (torch.randn(2, 3), torch.randn(2, 3))).graph_module


def calls(translation: Translation) -> dict[str, Any]:
    main = next(op.operation for op in translation.module.body.operations if "arg_attrs" in op.operation.attributes)
    found = [op.operation for op in main.regions[0].blocks[0].operations]
    return {op.attributes["fx.name"].value: op for op in found if "fx.name" in op.attributes}


def swap(translation: Translation) -> None:
    call = calls(translation)["sub"]
    call.operands[0], call.operands[1] = call.operands[1], call.operands[0]


def exchange(translation: Translation) -> None:
    call = calls(translation)["cat"]
    call.operands[2] = call.operands[1]


def bypass(translation: Translation) -> None:
    found = calls(translation)
    found["relu"].results[0].replace_all_uses_with(found["sub"].results[0])


def drop(translation: Translation) -> None:
    found = calls(translation)
    found["mul"].results[0].replace_all_uses_with(found["sub"].results[0])
    found["mul"].erase()


def rename(translation: Translation) -> None:
    nodes = dict(translation.nodes)
    nodes["sub"], nodes["mul"] = nodes["mul"], nodes["sub"]
    object.__setattr__(translation, "nodes", nodes)


@pytest.mark.parametrize("mutate", [swap, exchange, bypass, drop, rename])
def test_a_mutated_module_is_noticed(mutate: Callable[[Translation], None]) -> None:
    gm = a_graph()
    before, translation = facts(gm.graph), to_mlir(gm)
    mutate(translation)
    try:
        after = facts(to_fx(translation, gm))
    except AssertionError:  # an operand more or less than the node has
        return
    assert after != before


def test_a_lost_argument_is_noticed() -> None:
    gm = a_graph()
    before = facts(gm.graph)
    sub = next(node for node in gm.graph.nodes if node.name == "sub")
    sub.args = map_arg(sub.args, lambda node: node if node.name == "x" else 2)
    assert facts(gm.graph) != before


def test_unmarked_and_marked_graphs_alike() -> None:
    gm = tiny_models.decode_step("qwen2_moe", marked=False).graph_module
    there_and_back(gm)
    assert mark_multi_stream_moe_shared_experts(gm), "the marker reads a graph that came back"
