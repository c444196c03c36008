"""A function fused, and run every way its kernels can run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from one_op import DEVICE
from torch import Tensor
from torch.fx import GraphModule, Interpreter

from auxstream.capture.trace import trace
from auxstream.kernels import FusionReport, fuse_elementwise
from auxstream.kernels.launch import kernel_of
from auxstream.kernels.spec import KernelSpec

Function = Callable[..., Any]


class ModuleOf(torch.nn.Module):
    """A function as a module."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Tensor) -> Any:
        return self.function(*args)


def fused(function: Function, args: Sequence[Tensor], dynamic: Any = None) -> tuple[GraphModule, FusionReport]:
    """The graph of a function of tensors, fused. `dynamic`: per argument, the dimensions that are symbols."""
    if dynamic is None:
        gm = trace(ModuleOf(function), args).graph_module
    else:
        program = torch.export.export(ModuleOf(function), tuple(args), dynamic_shapes=(tuple(dynamic),), strict=False)
        gm = program.graph_module
    return gm, fuse_elementwise(gm)


def left_over(gm: GraphModule) -> list[str]:
    """The ops of a graph that no kernel runs, views and the parts of results apart."""
    found = [node for node in gm.graph.nodes if node.op == "call_function" and "auxstream_fused" not in node.meta]
    names = [str(node.target) for node in found]
    views = ("getitem", "view", "slice", "expand", "transpose", "unsqueeze", "chunk", "sym_size", "reshape", "to.dtype")
    return [name for name in names if not any(view in name for view in views)]


class _Running(Interpreter):
    def __init__(self, gm: GraphModule, specs: dict[str, KernelSpec], how: int | None) -> None:
        super().__init__(gm)
        self.specs = specs
        self.how = how
        self.exhausted = True

    def run_node(self, n: torch.fx.Node) -> Any:
        if "auxstream_fused" not in n.meta:
            return super().run_node(n)
        (inputs, sizes), _ = self.fetch_args_kwargs_from_env(n)
        kernel = kernel_of(self.specs[n.meta["auxstream_fused"]])
        if self.how is None:
            return kernel.reference(inputs, sizes)
        fenced = [_Fenced(like) for like in kernel.fake(inputs, sizes)]
        outputs = [fence.tensor for fence in fenced]
        if kernel.spec.row_count(sizes):
            launches = list(kernel.candidates(inputs, outputs, sizes).values())
            self.exhausted &= self.how >= len(launches) - 1
            launch = launches[min(self.how, len(launches) - 1)]
            launch([*kernel.laid_out(inputs, launch.copied, sizes), *outputs])
        for number, fence in enumerate(fenced):
            assert fence.stands(), f"{kernel.spec.name} wrote outside of output {number}"
        return outputs


class _Fenced:
    """A dense tensor in the middle of memory that nobody shall write; what a kernel forgets to write shows, too."""

    MARGIN = 64

    def __init__(self, like: Tensor) -> None:
        fill = True if like.dtype is torch.bool else 7
        self.memory = torch.full((like.numel() + 2 * self.MARGIN,), fill, dtype=like.dtype, device=like.device)
        self.before = self.memory.clone()
        self.tensor = self.memory.as_strided(like.shape, like.stride(), self.MARGIN)

    def stands(self) -> bool:
        for side in (slice(None, self.MARGIN), slice(-self.MARGIN, None)):
            if not torch.equal(self.memory[side], self.before[side]):
                return False
        return True


def every_way(gm: GraphModule, report: FusionReport, args: Sequence[Tensor]) -> Iterator[tuple[str, Any]]:
    """The graph's results: by torch from MLIR, then with each variant of its kernels in turn."""
    specs = {fusion.spec.name: fusion.spec for fusion in report.fusions}
    with torch.no_grad():
        if DEVICE == "cpu":
            yield "reference", _plain(_Running(gm, specs, None).run(*args))
        for how in range(16):
            running = _Running(gm, specs, how)
            yield f"variant {how}", _plain(running.run(*args))
            if running.exhausted:
                return


def _plain(result: Any) -> list[Tensor]:
    return list(result) if isinstance(result, tuple | list) else [result]
