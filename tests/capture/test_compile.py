"""A compiled model called like the model: structures, aliases, modes, refusals; compiling itself is not a call."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import auxstream
from auxstream.capture.compiler import CompiledModel
from auxstream.runtime.errors import InputError, TraceError


class Model(nn.Module):
    """`body` over a linear layer and a buffer."""

    def __init__(self, body: Callable[..., Any], buffer: Tensor | None = None) -> None:
        super().__init__()
        self.body = body
        self.linear = nn.Linear(8, 8)
        self.register_buffer("buffer", torch.zeros(4, 8) if buffer is None else buffer)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.body(self, *args, **kwargs)


def compiled(body: Callable[..., Any], *example: Any, **keywords: Any) -> tuple[Model, CompiledModel]:
    model = Model(body)
    return model, auxstream.compile(model, keywords or example)


def draw(*shape: int) -> Tensor:
    return torch.randn(*(shape or (4, 8)))


def add_one(model: Model, x: Tensor) -> Tensor:
    return x.add_(1)


def count_and_scale(model: Model, x: Tensor) -> Tensor:
    model.buffer = model.buffer + 1
    return model.linear(x) * model.buffer


def write_a_slice(model: Model, x: Tensor) -> Tensor:
    x[1:].mul_(2)
    model.buffer[:, :2].add_(x[:, 2:4])
    return model.linear(x) + model.buffer


BODIES: dict[str, tuple[Callable[..., Any], Callable[[], tuple[Any, ...]]]] = {
    "a dict with None and a number": (
        lambda m, x: {"a": m.linear(x), "b": (x + 1, None, 3, "text")},
        lambda: (draw(),),
    ),
    "nothing": (lambda m, x: (m.buffer.add_(x), None)[1], lambda: (draw(),)),
    "nested inputs": (
        lambda m, d, pair: m.linear(d["x"]) + pair[0] * pair[1][0],
        lambda: ({"x": draw()}, [draw(), (draw(),)]),
    ),
    "constants": (lambda m, x, n, flag, none: m.linear(x) * n if flag else x, lambda: (draw(), 3, True, None)),
    "the input": (lambda m, x: x, lambda: (draw(),)),
    "the mutated input": (add_one, lambda: (draw(),)),
    "views of the input": (lambda m, x: (x.t(), x[1:]), lambda: (draw(),)),
    "one tensor twice": (lambda m, x: (y := m.linear(x), y, y.t()), lambda: (draw(),)),
    "a buffer": (lambda m, x: m.buffer.copy_(x), lambda: (draw(),)),
    "a parameter": (lambda m, x: (m.linear.weight, x + 1), lambda: (draw(),)),
    "a buffer reassigned": (count_and_scale, lambda: (draw(),)),
    "writes through slices": (write_a_slice, lambda: (draw(),)),
    "transposed inputs": (lambda m, x: m.linear(x).t().reshape(-1), lambda: (draw(8, 4).t(),)),
    "expanded inputs": (lambda m, x: x.transpose(0, 1).reshape(32) * 2, lambda: (draw(4, 1).expand(4, 8),)),
    "strided inputs": (lambda m, x: x.t().reshape(-1).view(4, 8), lambda: (draw(16, 8)[::4],)),
    "no rows": (lambda m, x: (m.linear(x), x.sum()), lambda: (draw(0, 8),)),
    "random numbers": (lambda m, x: nn.functional.dropout(m.linear(x), 0.5) + torch.rand(4, 8), lambda: (draw(),)),
    "complex views": (
        lambda m, x: (torch.fft.fft(m.linear(x)).conj(), torch.view_as_real(torch.fft.fft(x))),
        lambda: (draw(),),
    ),
}


@pytest.mark.parametrize("what", BODIES)
def test_calls_equal_the_models(what: str) -> None:
    body, arguments = BODIES[what]
    model = Model(body)
    reference = copy.deepcopy(model)
    example = arguments()
    untouched = copy.deepcopy((example, model.state_dict(), torch.get_rng_state()))
    fast = auxstream.compile(model, example)
    assert_equal((example, model.state_dict(), torch.get_rng_state()), untouched)
    for _ in range(3):
        given = arguments()
        same = copy.deepcopy(given)
        rng = torch.get_rng_state()
        with torch.no_grad():
            expected = reference(*same)
        torch.set_rng_state(rng)
        assert_equal(fast(*given), expected)
        assert_equal(given, same)
        assert_equal(model.state_dict(), reference.state_dict())


def assert_equal(got: Any, expected: Any) -> None:
    leaves, structure = pytree.tree_flatten(got)
    wanted, wanted_structure = pytree.tree_flatten(expected)
    assert structure == wanted_structure
    for one, other in zip(leaves, wanted, strict=True):
        if isinstance(other, Tensor):
            assert one.dtype == other.dtype
            assert torch.equal(one, other)
        else:
            assert one == other


def test_keywords_in_any_order() -> None:
    model, fast = compiled(lambda m, x, scale: m.linear(x) * scale, x=draw(), scale=draw())
    x, scale = draw(), draw()
    assert torch.equal(fast(scale=scale, x=x), model(x, scale))
    with pytest.raises(InputError, match="structure"):
        fast(x, scale)


def test_one_tensor_as_example() -> None:
    model = Model(lambda m, x: m.linear(x))
    x = draw()
    assert torch.equal(auxstream.compile(model, x)(x), model(x))
    with pytest.raises(InputError, match="no form"):
        auxstream.compile(model, 3)


# --- memory -----------------------------------------------------------------------------------------------------------


def test_outputs_may_be_the_next_calls_inputs() -> None:
    _, swap = compiled(lambda m, a, b: (b, a), draw(), draw())
    a, b = draw(), draw()
    first, second = swap(*swap(a, b))
    assert torch.equal(first, a)
    assert torch.equal(second, b)
    _, turn = compiled(lambda m, a, b: (b[:], a[:]), draw(), draw())
    first, second = turn(*turn(a, b))
    assert torch.equal(first, a)
    assert torch.equal(second, b)
    model, fast = compiled(lambda m, x: m.linear(x), draw())
    assert torch.equal(fast(fast(a)), model(model(a)))


def test_an_input_that_is_returned_is_the_callers_own() -> None:
    _, fast = compiled(lambda m, x, cache: {"y": x * 2, "cache": cache.add_(x)}, draw(), draw())
    cache = torch.zeros(4, 8)
    for k in range(1, 4):
        out = fast(torch.ones(4, 8), cache)
        assert out["cache"] is cache
        assert torch.equal(cache, torch.full((4, 8), float(k)))


def test_inputs_the_model_only_reads_may_share_memory() -> None:
    model, fast = compiled(lambda m, x, y: m.linear(x) + y, draw(), draw())
    x = draw()
    assert torch.equal(fast(x, x), model(x, x))
    model, fast = compiled(lambda m, x: m.linear(x), draw(8, 8))
    assert torch.equal(fast(model.linear.weight), model(model.linear.weight))


def test_an_example_that_is_a_parameter_stands_for_any_tensor() -> None:
    model = Model(lambda m, x: m.linear(x))
    fast = auxstream.compile(model, model.linear.weight)
    x = draw(8, 8)
    assert torch.equal(fast(x), model(x))


def test_shared_memory_that_is_written_is_refused() -> None:
    def body(model: Model, x: Tensor, y: Tensor) -> Tensor:
        model.buffer.add_(1)
        return x.add_(1) + y

    model, fast = compiled(body, draw(), draw())
    rows = draw(8, 8)
    before = rows.clone()
    for x, y, text in (
        (rows[:4], rows[3:7], "shares memory with input"),
        (rows[:4], model.buffer, "a buffer of the model"),
        (fast(draw(), draw()), rows[:4], "an output of an earlier call"),
        (draw(4, 1).expand(4, 8), rows[:4], "itself: it is expanded"),
    ):
        with pytest.raises(InputError, match=text) as caught:
            fast(x, y)
        assert "clone()" in str(caught.value)
    assert torch.equal(rows, before)
    fast(rows[:4], rows[4:])  # neighbours share a storage, and no byte
    assert torch.equal(rows[:4], before[:4] + 1)


# --- modes ------------------------------------------------------------------------------------------------------------


def test_inputs_that_want_gradients_leave_none_behind() -> None:
    model, fast = compiled(lambda m, x: (m.linear(x.add_(1)), x[:]), draw())
    for _ in range(2):
        x = draw().requires_grad_()
        expected = model.linear(x.detach() + 1)
        out, view = fast(x)
        assert torch.equal(out, expected)
        assert not out.requires_grad
        assert not view.requires_grad
        assert torch.equal(x, view)


def test_compiled_in_inference_mode_and_called_outside_and_the_reverse() -> None:
    model = Model(lambda m, x: m.linear(x))
    x = draw()
    with torch.inference_mode():
        inside = auxstream.compile(model, (draw(),))
    outside = auxstream.compile(model, (draw(),))
    for fast in (inside, outside):
        assert torch.equal(fast(x), model(x))
        with torch.inference_mode():
            assert torch.equal(fast(x.clone()), model(x))


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        (draw(),),
        (draw(), 3, draw()),
        (draw(), 4),
        (draw(), True),
        (draw(4, 9), 3),
        (draw().double(), 3),
        (draw().to("meta"), 3),
        (draw().to_sparse(), 3),
        (3, draw()),
    ],
    ids=lambda arguments: ", ".join(getattr(a, "type", lambda a=a: str(a))() for a in arguments),
)
def test_other_arguments_are_refused(arguments: tuple[Any, ...]) -> None:
    _, fast = compiled(lambda m, x, n: x * n, draw(), 3)
    with pytest.raises(InputError) as caught:
        fast(*arguments)
    assert "tensor(" not in str(caught.value)  # no numbers, only what kind of tensor it is


def test_a_zero_of_the_other_sign_is_another_constant() -> None:
    model, fast = compiled(lambda m, x, n: x * n, draw(), 0.0)
    x = draw()
    assert torch.equal(fast(x, 0.0).signbit(), model(x, 0.0).signbit())
    with pytest.raises(InputError, match="constant"):
        fast(x, -0.0)


def test_a_constant_that_is_no_number_is_itself() -> None:
    model, fast = compiled(lambda m, x, n: m.linear(x).where(x > 0, n), draw(), float("nan"))
    x = draw()
    torch.testing.assert_close(fast(x, float("nan")), model(x, float("nan")), rtol=0, atol=0, equal_nan=True)
    with pytest.raises(InputError, match="constant"):
        fast(x, 1.0)


def test_a_refused_call_changes_nothing() -> None:
    _, fast = compiled(lambda m, a, b: (a + 0, m.linear(b)), draw(), draw())
    first, _ = fast(draw(), draw())
    before = first.clone()
    with pytest.raises(InputError, match="differs"):
        fast(draw(), draw(5, 8))
    fast.graph.replay()
    assert torch.equal(first, before)


def test_sparse_examples_are_refused() -> None:
    with pytest.raises(InputError, match="strided"):
        auxstream.compile(Model(lambda m, x: x @ x), (torch.eye(4).to_sparse(),))


def test_a_model_that_cannot_be_traced_is_as_before() -> None:
    def body(model: Model, x: Tensor) -> Tensor:
        model.buffer.add_(1)
        return x[x > 0]

    model = Model(body)
    with pytest.raises(TraceError):
        auxstream.compile(model, (draw(),))
    assert torch.equal(model.buffer, torch.zeros(4, 8))


def test_a_compiled_model_within_a_model_is_refused() -> None:
    _, inner = compiled(lambda m, x: m.linear(x), draw())
    with pytest.raises(InputError, match="compile the outer model alone"):
        auxstream.compile(Model(lambda m, x: inner(x) + 1), (draw(),))


@pytest.mark.gpu
def test_each_warm_up_run_starts_from_the_same_state() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("position", torch.tensor([7], device="cuda"))
            self.register_buffer("cache", torch.zeros(8, 4, device="cuda"))

        def forward(self, x: Tensor) -> Tensor:
            self.cache.index_copy_(0, self.position, x)  # past row 7 this is an error on the device
            self.position.add_(1)
            return self.cache * 2

    model = Counts()
    fast = auxstream.compile(
        model,
        (torch.ones(1, 4, device="cuda"),),
        options=auxstream.Options(multi_stream_moe=False, mlir_elementwise_fusion=False, warmup=3),
    )
    assert model.position.item() == 7
    out = fast(torch.full((1, 4), 2.0, device="cuda"))
    assert out[7].tolist() == [4.0] * 4
    assert model.position.item() == 8


class Sums(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(4))

    def forward(self, x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        self.seen.add_(x[0])
        return x * 2 + y + mask


def test_calls_with_the_graphs_own_inputs_copy_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Sums()
    x, y, mask = torch.ones(3, 4), torch.ones(3, 4), torch.ones(4, dtype=torch.int64)
    fast = auxstream.compile(model, (x, y, mask))
    (own_x, own_y, own_mask), keywords = fast.inputs
    assert not keywords
    own_x.fill_(5)
    own_y.copy_(torch.arange(12.0).reshape(3, 4))
    own_mask.fill_(7)
    copied: list[int] = []
    copy = torch._foreach_copy_
    monkeypatch.setattr(torch, "_foreach_copy_", lambda *groups: (copied.append(len(groups[0])), copy(*groups)))
    assert torch.equal(fast(own_x, own_y, own_mask), 10 + own_y + 7)
    assert copied == []
    assert torch.equal(fast(own_x, y, own_mask), torch.full((3, 4), 18.0))
    assert copied == [2], "x goes onto itself, with y, by one kernel"
    assert torch.equal(model.seen, torch.full((4,), 10.0))


def test_the_graphs_own_inputs_in_other_places_are_refused() -> None:
    model = Sums()
    fast = auxstream.compile(model, (torch.ones(3, 4), torch.ones(3, 4), torch.ones(4, dtype=torch.int64)))
    (x, y, mask), _ = fast.inputs
    y.fill_(2)
    for given in ((y, x, mask), (x, x, mask), (torch.ones(3, 4), y.view(3, 4), mask)):
        with pytest.raises(InputError, match="not in its place"):
            fast(*given)
    assert torch.equal(x, torch.ones(3, 4)), "nothing was copied"
    assert torch.equal(y, torch.full((3, 4), 2.0))
    assert not model.seen.any(), "nothing ran"
