"""The recorder and the simulated machine: real torch code, recorded once and replayed in orders that hurt, against the
same code run eagerly on copies, bit for bit."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import auxstream
from auxstream.capture import verify
from auxstream.capture.graphs import SimulatedGraph
from auxstream.capture.program import Op
from auxstream.runtime.errors import CaptureError, HostReadError, SimulatedFault
from auxstream.runtime.regions import open_region


def same(a: Any, b: Any) -> bool:
    """Bitwise equality of two pytrees of tensors, NaNs and all."""

    def plain(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        dense = leaf.detach().resolve_conj().resolve_neg().contiguous()
        return leaf.dtype, tuple(leaf.shape), dense.reshape(-1).view(torch.uint8).tolist()

    left, right = pytree.tree_leaves(a), pytree.tree_leaves(b)
    return len(left) == len(right) and all(plain(x) == plain(y) for x, y in zip(left, right, strict=True))


def refill(tensor: Tensor, seed: int) -> None:
    """New contents; small whole numbers, so that sums are exact in any order."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        tensor.copy_(torch.randint(-4, 5, tuple(tensor.shape), generator=generator))


def replays_match(
    work: Callable[..., Any], inputs: Sequence[Tensor], kept: Sequence[Tensor] = (), *, replays: int = 12
) -> SimulatedGraph:
    """Capture work(*inputs, *kept); replay with new inputs each time, and compare outputs, inputs and `kept` (buffers
    that carry over) with eager runs on copies. Recording itself must change nothing."""
    for k, tensor in enumerate(inputs):
        refill(tensor, 1000 + k)
    before = [tensor.clone() for tensor in (*inputs, *kept)]
    rng = torch.get_rng_state()
    with auxstream.graph(device="cpu") as g:
        out = work(*inputs, *kept)
    assert same([*inputs, *kept], before), "recording left its mark on outside memory"
    assert torch.equal(torch.get_rng_state(), rng), "recording moved the random state"
    twins = [tensor.detach().clone().requires_grad_(tensor.requires_grad) for tensor in (*inputs, *kept)]
    for k in range(replays):
        for position, tensor in enumerate(inputs):
            refill(tensor, 7 * k + position)
            refill(twins[position], 7 * k + position)
        torch.manual_seed(k)
        expected = work(*twins)
        after = torch.get_rng_state()
        torch.manual_seed(k)
        g.replay()
        assert torch.equal(torch.get_rng_state(), after), f"random state after replay {k}"
        assert same(out, expected), f"outputs differ in replay {k}\n{g.program}"
        assert same([*inputs, *kept], twins), f"outside memory differs in replay {k}\n{g.program}"
    assert g.report.ok
    assert isinstance(g, SimulatedGraph)
    return g


def two_branches(caller: Callable[[], Any], branch: Callable[[], Any], *reads: Tensor, writes: Any = ()) -> Any:
    return auxstream.parallel(caller, branch, reads=reads, writes=writes)


# --- programs ---------------------------------------------------------------------------------------------------------


def arithmetic(x: Tensor, y: Tensor) -> Any:
    routed, shared = two_branches(lambda: (x @ y).relu(), lambda: (x - 1) @ (y * 2), x, y)
    return routed + shared


def in_place(x: Tensor, y: Tensor) -> Any:
    h = x * 2
    a, b = two_branches(lambda: y.clone().mul_(3).add_(h), lambda: (h + 1).sub_(2).clamp_(min=0), h)
    return a.add_(b), h


def views(x: Tensor, y: Tensor) -> Any:
    h = (x + y).t()
    parts = h.chunk(2, dim=0)
    a, b = two_branches(lambda: parts[0].reshape(-1) + 1, lambda: parts[1].transpose(0, 1)[:, ::2] * 2, *parts)
    return a.view(2, -1), b, h[1:, :2], h.unsqueeze(0).expand(3, -1, -1), parts[1].diagonal()


def out_arguments(x: Tensor, y: Tensor) -> Any:
    a, b = torch.empty(4, 4), torch.empty(4, 4)
    two_branches(lambda: torch.add(x, y, out=a), lambda: torch.mul(x, y, out=b), x, y, writes=b)
    c = torch.empty(2, 4)
    return torch.sub(a[:2], b[2:], out=c), torch.max(x, 0)


def lists(x: Tensor, y: Tensor) -> Any:
    a, b = two_branches(
        lambda: torch.cat([x, y[:2]]), lambda: torch._foreach_mul(torch._foreach_add([x, y], 1), [y, x]), x, y
    )
    torch._foreach_add_(b, 3.0)
    return torch.stack([a[:4], *b]), torch.split(a, 4), torch.einsum("ij,kj->ik", x, y)


def indexed(x: Tensor, y: Tensor) -> Any:
    rows = torch.tensor([2, 0, 2])
    h = x.clone()
    h[rows] = y[rows] + 1
    h.index_put_((rows, rows), torch.ones(3), accumulate=True)
    h[y > 0] = 0.0
    gathered = torch.gather(x, 1, y.argsort(dim=1, stable=True))
    return h, x[rows, :2], gathered, x.index_select(0, rows), F.embedding(rows, y), torch.where(x > y, x, y)


def scattered(x: Tensor, y: Tensor) -> Any:
    top, which = x.topk(2, dim=1)
    out = torch.zeros(4, 4).scatter_(1, which, top)
    return out.index_add_(0, torch.tensor([1, 3]), y[:2]), out.masked_fill(y > 0, -1.0), x.sort(dim=0, stable=True)


def keywords(x: Tensor, y: Tensor) -> Any:
    mask = torch.ones(4, 4, dtype=torch.bool).tril()
    attended = F.scaled_dot_product_attention(query=x[None], key=y[None], value=x[None], attn_mask=mask)
    return (
        torch.add(input=x, other=y, alpha=2),
        torch.clamp(x, min=y),
        F.layer_norm(x, (4,), weight=y[0], bias=None),
        torch.ops.aten.mul.Tensor(self=x, other=y),
        attended.shape,
    )


def mixed_types(x: Tensor, y: Tensor) -> Any:
    half, whole = x.to(torch.bfloat16), y.long()
    a, b = two_branches(lambda: half * 3, lambda: (whole << 1) & 6, half, whole)
    return a, b, x.view(torch.int32) + 1, (x > 0) ^ (y > 0), x.double().half(), a.float().contiguous()


def complex_views(x: Tensor, y: Tensor) -> Any:
    z = torch.complex(x, y)
    a, b = two_branches(lambda: z.conj() * z, lambda: z.conj().imag + z.real, z)
    made = torch.empty(4, 4, dtype=torch.complex64)
    made.copy_(z.conj())
    return a, b, made, z.conj().clone(), torch.view_as_real(z) * 2, z.conj().t().resolve_conj(), -z.conj().imag


def empty_ones(x: Tensor, y: Tensor) -> Any:
    none = x[:0] * 2
    a, b = two_branches(lambda: none.sum() + 1, lambda: torch.cat([none, y]), none, y)
    return a, b, none, torch.zeros(0), torch.empty(3, 0) @ torch.empty(0, 2), none.view(0, 2, 2)


def scalars(x: Tensor, y: Tensor) -> Any:
    s = x.sum()
    a, b = two_branches(lambda: s * 2, lambda: y / 4 + s, s)
    return a, b, 1 - s, s.expand(3), torch.full((2,), 3.0), torch.scalar_tensor(2.0) + s, x.shape[0]


def constants(x: Tensor, y: Tensor) -> Any:
    c = torch.tensor([1.0, 2.0, 3.0, 4.0])
    c.add_(x[0])  # a constant is made anew by each replay
    d = torch.as_tensor([[1.0], [2.0]])
    return c, x + c, d * y[:2], torch.arange(4) * x


def passed_through(x: Tensor, y: Tensor) -> Any:
    """Ops that may give their input back."""
    h = x + y
    return h, h.contiguous(), h.reshape(4, 4), h.to(torch.float32), h.t().contiguous(), h.expand(4, 4), x.view(-1), x


def bits(x: Tensor, y: Tensor) -> Any:
    _, shared = two_branches(lambda: x.isnan(), lambda: (x * float("nan"), x / 0.0, -x * 0.0), x)
    return shared


def no_region(x: Tensor, y: Tensor) -> Any:
    return x, (x + y).softmax(-1).argmax(-1), [None, {"k": y.cumsum(0)}]


@pytest.mark.parametrize(
    "work",
    [
        arithmetic,
        in_place,
        views,
        out_arguments,
        lists,
        indexed,
        scattered,
        keywords,
        mixed_types,
        complex_views,
        empty_ones,
        scalars,
        constants,
        passed_through,
        bits,
        no_region,
    ],
    ids=lambda work: work.__name__,
)
@pytest.mark.parametrize("mode", ["grad", "no_grad", "inference"])
def test_replays_equal_eager(work: Callable[..., Any], mode: str) -> None:
    def in_mode(*tensors: Tensor) -> Any:
        if mode == "grad":
            return work(*tensors)
        with torch.no_grad() if mode == "no_grad" else torch.inference_mode():
            return work(*tensors)

    replays_match(in_mode, [torch.empty(4, 4), torch.empty(4, 4)])


def test_a_capture_inside_inference_mode() -> None:
    with torch.inference_mode():
        made = torch.zeros(4, 4)
        g = replays_match(lambda x, k: (k.add_(x), k * 2), [torch.empty(4, 4)], [made])
    g.replay()
    with torch.inference_mode():
        g.replay()


# --- mutated buffers --------------------------------------------------------------------------------------------------


def test_buffers_carry_over_from_replay_to_replay() -> None:
    def work(x: Tensor, total: Tensor, cache: Tensor, position: Tensor) -> Any:
        region = auxstream.fork("update", x, writes=(total, cache))
        y = x * 2
        with region:
            total.add_(x)
            cache.index_copy_(0, position, region.returns(x[:1] * 3))
        region.join()
        position.add_(1).remainder_(5)
        return y + total, cache.sum(0)

    kept = [torch.zeros(4, 4), torch.zeros(5, 4), torch.zeros(1, dtype=torch.long)]
    replays_match(work, [torch.empty(4, 4)], kept, replays=25)


def test_in_place_on_views_of_outside_memory() -> None:
    def work(x: Tensor, buffer: Tensor) -> Any:
        buffer[1:3, ::2].mul_(2).add_(x[:2, :2])
        buffer.t()[0].copy_(x[3])
        buffer.view(-1)[5] = 9.0
        return buffer.sum()

    replays_match(work, [torch.empty(4, 4)], [torch.arange(16.0).view(4, 4).clone()])


def test_a_parameter_and_a_module() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.GELU(), nn.Linear(4, 2))
    with torch.no_grad():
        replays_match(lambda x: model(x), [torch.empty(3, 4)])


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_batch_norm_s_hidden_writes(mode: Any) -> None:
    model = nn.BatchNorm1d(4)

    def work(x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        with mode():
            return F.batch_norm(x, mean, var, training=True)

    g = replays_match(work, [torch.empty(8, 4)], [model.running_mean.clone(), model.running_var.clone()])
    written = {ref.buffer for step in g.program.steps if isinstance(step, Op) for ref in step.writes}
    assert sum(g.program.buffers[buffer].stream is None for buffer in written) == 2


def test_memory_shared_with_numpy_is_restored() -> None:
    array = np.zeros(4, dtype=np.float32)
    one, two = torch.from_numpy(array), torch.from_numpy(array)
    with auxstream.graph(device="cpu") as g:
        one.add_(1)
        two.mul_(3)
        one.add_(1)
    assert array.tolist() == [0.0] * 4
    g.replay()
    assert array.tolist() == [4.0] * 4


def test_backward_inside() -> None:
    def work(x: Tensor, w: Tensor) -> Any:
        with torch.enable_grad():
            leaf = w.detach().requires_grad_()
            region = auxstream.fork("aux", x, leaf)
            a = (x @ leaf).square().sum()
            with region:
                b = region.returns((x * leaf).sum())
            region.join()
            (grad,) = torch.autograd.grad(a + b, leaf)
        return grad, a.detach()

    replays_match(work, [torch.empty(4, 4), torch.empty(4, 4)])


def test_backward_into_grad() -> None:
    w = nn.Parameter(torch.empty(4))
    w.grad = torch.zeros(4)
    x = torch.ones(4)
    with auxstream.graph(device="cpu") as g:
        (w * x).square().sum().backward()
    assert torch.equal(w.grad, torch.zeros(4))
    total = torch.zeros(4)
    for k in range(5):
        refill(w, k)
        refill(x, k + 50)
        g.replay()
        total += (2 * w * x * x).detach()
        assert torch.equal(w.grad, total)


def test_a_leaf_that_requires_grad_cannot_be_written() -> None:
    w = nn.Parameter(torch.ones(3))
    with pytest.raises(RuntimeError, match="leaf Variable"), auxstream.graph(device="cpu"):
        w.add_(1)
    assert torch.equal(w.detach(), torch.ones(3))


# --- random numbers ---------------------------------------------------------------------------------------------------


def test_random_ops_draw_as_eager_does() -> None:
    def work(x: Tensor, buffer: Tensor) -> Any:
        buffer.uniform_()
        return torch.rand(3), torch.randn_like(x), F.dropout(x, 0.5), torch.randperm(5), torch.bernoulli(buffer)

    replays_match(work, [torch.empty(4, 4)], [torch.zeros(4)])


def test_random_ops_of_two_branches_draw_the_same_in_every_order() -> None:
    def work(x: Tensor, buffer: Tensor) -> Any:
        region = auxstream.fork("aux", x, writes=buffer)
        a = F.dropout(x, 0.5)
        with region:
            b = region.returns(torch.randn(5))
            buffer.add_(torch.rand(4))
        c = torch.rand(2)
        region.join()
        return a, b, c, torch.rand(2)

    g = replays_match(work, [torch.empty(4, 4)], [torch.zeros(4)], replays=30)
    orders = {tuple(g.simulation.orders.adversarial(k)) for k in range(30)}
    assert len(orders) > 3, "several orders were met"


def test_a_generator_of_the_user_s_is_put_back() -> None:
    mine = torch.Generator().manual_seed(3)
    before = mine.get_state()
    with auxstream.graph(device="cpu") as g:
        out = torch.rand(4, generator=mine)
    assert torch.equal(mine.get_state(), before)
    expected = torch.rand(4, generator=torch.Generator().manual_seed(3))
    g.replay()
    assert torch.equal(out, expected)


# --- the machine ------------------------------------------------------------------------------------------------------


def test_outputs_are_updated_in_place() -> None:
    x = torch.ones(4)
    with auxstream.graph(device="cpu") as g:
        out = x * 2
        view = out[1:3]
    address = out.data_ptr()
    for k in range(4):
        x.fill_(float(k))
        g.replay()
        assert out.data_ptr() == address
        assert view.tolist() == [2.0 * k] * 2


def test_external_inputs_are_kept_alive() -> None:
    x = torch.arange(4.0)
    with auxstream.graph(device="cpu") as g:
        out = x + 1
    del x
    gc.collect()
    junk = [torch.full((4,), -1.0) for _ in range(64)]
    g.replay()
    assert out.tolist() == [1.0, 2.0, 3.0, 4.0]
    assert junk


def test_values_of_the_recording_serve_metadata_only() -> None:
    """A replay recomputes all: nothing of the recorded values survives in the arena."""
    x = torch.ones(4)
    with auxstream.graph(device="cpu") as g:
        hidden = x * 3
        out = hidden + 1
        del hidden
    x.zero_()
    g.replay()
    assert out.tolist() == [1.0] * 4


def test_a_corrupted_index_is_a_fault_that_names_the_line() -> None:
    table, position = torch.arange(4.0), torch.zeros(1, dtype=torch.long)
    with auxstream.graph(device="cpu") as g:
        table.index_select(0, position)
    position.fill_(99)
    with pytest.raises(SimulatedFault, match=r"index_select.*test_simulator\.py:\d+: table\.index_select"):
        g.replay()
    position.fill_(1)
    g.replay()


def test_an_assertion_on_values_is_recorded_as_a_read() -> None:
    x = torch.ones(4)
    with auxstream.graph(device="cpu") as g:
        torch._assert_async((x > 0).all())
    (check,) = [step for step in g.program.steps if isinstance(step, Op) and "assert" in step.name]
    assert len(check.reads) == 1
    g.replay()
    x.zero_()
    with pytest.raises(SimulatedFault):
        g.replay()


def test_metadata_alone_makes_no_step() -> None:
    x = torch.ones(2, 4)
    with auxstream.graph(device="cpu") as g:
        y = x * 2
        z = y.t().unsqueeze(0).expand(3, -1, -1)[0].detach()
        y.unsqueeze_(0).transpose_(0, 1)
        out = z + 1
    assert [step.name for step in g.program.steps if isinstance(step, Op)] == ["mul.Tensor", "add.Tensor"]
    for _ in range(80):  # in-place views of the recording must not pile up
        g.replay()
    assert torch.equal(out, torch.full((4, 2), 3.0))
    assert y.shape == (2, 1, 4)


def test_a_view_of_an_aux_result_may_be_taken_before_the_join() -> None:
    x = torch.ones(2, 4)
    with auxstream.graph(device="cpu") as g:
        with auxstream.aux_region("aux", x) as region:
            y = region.returns(x + 1)
        flat = y.view(-1)
        region.join()
        out = flat * 2
    g.replay()
    assert torch.equal(out, torch.full((8,), 4.0))


# --- lifetimes --------------------------------------------------------------------------------------------------------


def arena_blocks(work: Callable[[], Any]) -> tuple[int, SimulatedGraph]:
    """How many blocks of one size the program needed."""
    with auxstream.graph(device="cpu", verify="off") as g:
        result = work()
    del result
    return g.memory.reserved // 1024, g


def test_a_dead_temporary_is_reused_at_once() -> None:
    x = torch.ones(256)

    def chain() -> Tensor:
        h = x + 1
        for _ in range(20):
            h = h + 1
        return h

    def tree() -> list[Tensor]:
        return [x + k for k in range(20)]

    assert arena_blocks(chain)[0] == 2, "the old value and the new one"
    assert arena_blocks(tree)[0] == 20


def test_the_recorder_keeps_no_returned_tensor_alive() -> None:
    x = torch.ones(256)
    freed: list[bool] = []

    def work() -> Tensor:
        total = x * 0
        for _ in range(4):
            region = auxstream.fork("aux", x)
            with region:
                y = region.returns(x + 1)
            region.join()
            total = total + y
            storage = y.untyped_storage()._weak_ref()
            del y, region
            freed.append(torch.UntypedStorage._expired(storage))
            torch.UntypedStorage._free_weak_ref(storage)
        return total

    _, g = arena_blocks(work)
    assert freed == [True] * 4
    assert len(g.simulation.visible) <= 1, "only `total` could be seen at the end"


def test_held_tensors_live_until_the_join() -> None:
    x = torch.ones(256)

    def work(*, hold: bool) -> Any:
        h = x * 2
        region = open_region("aux", held=[h] if hold else ())
        with region:
            region.returns(h + 1)
        del h
        z = x + 5
        region.join()
        w = x + 6
        return z, w

    def reuses(*, hold: bool) -> list[str]:
        _, g = arena_blocks(lambda: work(hold=hold))
        (old,) = [b for b in g.program.buffers if b.label == "mul.Tensor"]
        ops = [step for step in g.program.steps if isinstance(step, Op)]
        return [op.region or "caller" for op in ops if g.program.buffers[op.writes[0].buffer].address == old.address][
            1:
        ]

    held = arena_blocks(lambda: work(hold=True))[1]
    free = arena_blocks(lambda: work(hold=False))[1]
    assert reuses(hold=True) == ["caller"], "reused, but by the op after the join"
    assert reuses(hold=False) == ["caller"]
    assert verify(held).ok
    assert not verify(free).ok


# --- what cannot be recorded ------------------------------------------------------------------------------------------

HOST_READS: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda x: x.sum().item(),
    "float": lambda x: float(x.sum()),
    "int": lambda x: int(x.sum()),
    "bool": lambda x: bool((x > 0).all()),
    "if": lambda x: 1 if x.sum() > 0 else 2,
    "tolist": lambda x: x.tolist(),
    "numpy": lambda x: x.numpy(),
    "asarray": lambda x: np.asarray(x),
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x > 0),
    "mask": lambda x: x[x > 0],
    "mask write": lambda x: x.clone().index_put_((x > 0,), torch.ones(2)),
    "masked_select": lambda x: x.masked_select(x > 0),
    "unique": lambda x: x.unique(),
    "equal": lambda x: torch.equal(x, x),
    "allclose": lambda x: torch.allclose(x, x),
    "repeat_interleave": lambda x: x.repeat_interleave(torch.tensor([1, 2])),
    "bincount": lambda x: x.long().bincount(),
    "index": lambda x: [1, 2, 3][x.long().sum()],
}


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode])
@pytest.mark.parametrize("read", HOST_READS)
def test_host_reads_are_refused_with_their_line(read: str, mode: Any) -> None:
    x = torch.ones(2)
    rng = torch.get_rng_state()
    with pytest.raises(HostReadError) as caught, auxstream.graph(device="cpu"), mode():  # noqa: PT012
        torch.rand(3)
        x.mul_(2)
        HOST_READS[read](x)
    assert "test_simulator.py:" in str(caught.value)
    assert "remedy:" in str(caught.value)
    assert torch.equal(x, torch.ones(2))
    assert torch.equal(torch.get_rng_state(), rng)
    HOST_READS[read](x)  # outside of a capture it works


def test_masked_writes_of_one_value_are_no_host_read() -> None:
    def work(x: Tensor) -> Tensor:
        y = x.clone()
        y[x > 0] = 7.0
        return y

    replays_match(work, [torch.empty(4, 4)])


@pytest.mark.parametrize(
    "resize",
    [
        lambda x: x.clone().resize_(5000),
        lambda x: torch.add(x, x, out=torch.empty(0)),
        lambda x: x.clone().resize_as_(torch.empty(9000)),
    ],
)
def test_resizing_is_refused(resize: Callable[[Tensor], Any]) -> None:
    text = r"resizes a tensor's memory.*test_simulator\.py"
    with pytest.raises(CaptureError, match=text), auxstream.graph(device="cpu"):
        resize(torch.ones(4))


def test_shrinking_and_same_size_are_fine() -> None:
    def work(x: Tensor) -> Any:
        y = (x + 1).resize_(2, 4)
        z = torch.empty(4, 4)
        return y * 2, torch.add(x, x, out=z).resize_as_(x)

    replays_match(work, [torch.empty(4, 4)])


@pytest.mark.filterwarnings("ignore:torch.quantize:UserWarning")
def test_sparse_and_quantised_tensors_are_refused() -> None:
    sparse = torch.eye(3).to_sparse()
    with pytest.raises(CaptureError, match="not plain strided memory"), auxstream.graph(device="cpu"):
        sparse @ torch.ones(3, 3)
    with pytest.raises(CaptureError, match=r"(?s)not plain strided.*to_dense"), auxstream.graph(device="cpu"):
        torch.eye(3).to_sparse()
    quantised = torch._empty_affine_quantized([4], scale=0.1, zero_point=0, dtype=torch.quint8)
    with pytest.raises(CaptureError, match="quint8"), auxstream.graph(device="cpu"):
        quantised.dequantize()


class Tagged(Tensor):
    """A subclass that only adds a name."""


def test_tensor_subclasses() -> None:
    x = torch.arange(4.0).as_subclass(Tagged)
    with auxstream.graph(device="cpu") as g:
        out = x * 2
    x.fill_(3.0)
    g.replay()
    assert isinstance(out, Tagged)
    assert out.tolist() == [6.0] * 4


def test_wrapper_subclasses_are_unwrapped() -> None:
    two_tensor = pytest.importorskip("torch.testing._internal.two_tensor")
    pair = two_tensor.TwoTensor(torch.ones(3), torch.full((3,), 2.0))
    with auxstream.graph(device="cpu") as g:
        out = pair * 2
    pair.a.fill_(5.0)
    g.replay()
    assert out.a.tolist() == [10.0] * 3
    assert out.b.tolist() == [4.0] * 3
    assert sum(isinstance(step, Op) for step in g.program.steps) == 2
