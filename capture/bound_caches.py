"""Layers of transformers' cache over buffers that somebody else owns.

Enters: one layer's state, and where the tokens of this call stand. Leaves: what a model takes for a cache layer, which
writes those buffers in place. Invariant: nothing here owns state, and positions are tensors: a tracer freezes none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, LinearAttentionLayer


class BoundLayer(CacheLayerMixin):
    """One layer's keys and values, `[rows, heads, positions, head_dim]`; each row has one token, at `position`, `[1]`
    or `[rows]`.

    Sliding-window layers use it too and leave the window to the mask: transformers' own sliding static layer branches
    on a Python integer, which would freeze one branch into a traced graph.
    """

    is_compileable = True
    is_sliding = False

    def __init__(self, keys: Tensor, values: Tensor, position: Tensor) -> None:
        super().__init__()
        self.keys, self.values = keys, values
        self.bound = (keys, values)
        self.position = position
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise AssertionError("a bound cache layer is born initialized")

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        for cache, states in zip(self.bound, (key_states, value_states), strict=True):
            if self.position.shape[0] == 1:
                cache.index_copy_(2, self.position, states)
            else:
                rows = torch.arange(cache.shape[0], device=cache.device)
                # With a slice between two index tensors, the indexed dimensions come first: [batch, heads, head_dim].
                cache[rows, :, self.position] = states[:, :, 0]
        return self.bound

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.bound[0].shape[2], 0

    def get_seq_length(self) -> Any:
        return self.position

    def get_max_length(self) -> int:
        return self.bound[0].shape[2]


class BoundRow(BoundLayer):
    """The row `slot` of one layer's keys and values, for many tokens of one sequence: `position` `[tokens]`."""

    def __init__(self, keys: Tensor, values: Tensor, position: Tensor, slot: Tensor) -> None:
        super().__init__(keys, values, position)
        self.slot = slot

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        for cache, states in zip(self.bound, (key_states, value_states), strict=True):
            cache[self.slot, :, self.position] = states[0].transpose(0, 1)
        keys, values = self.bound
        return keys.index_select(0, self.slot), values.index_select(0, self.slot)

    def get_seq_length(self) -> Any:
        """What models add to 0, 1, 2, ... for the positions of the tokens."""
        return self.position - torch.arange(self.position.shape[0], device=self.position.device)


class BoundRecurrence(LinearAttentionLayer):
    """One layer's convolution and recurrent states; a layer without state too.

    Zeros are the state before the first token, so there always is a previous state.
    """

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        super().__init__()
        if (conv := state.get("conv")) is not None:
            self.conv_states[0], self.conv_kernel_size[0] = conv, conv.shape[-1]
            self.is_conv_states_initialized[0] = True
        if (recurrent := state.get("recurrent")) is not None:
            self.recurrent_states[0] = recurrent
            self.is_recurrent_states_initialized[0] = True
        self.has_previous_state[0] = True


class BoundHybrid(BoundRecurrence):
    """A layer with attention and a recurrence side by side: caches know the one by class, the other by `update`."""

    def __init__(self, state: Mapping[str, Tensor], attention: BoundLayer) -> None:
        super().__init__(state)
        self.update = attention.update


def bound(state: Mapping[str, Tensor], attention: Callable[[Tensor, Tensor], BoundLayer]) -> Any:
    """The cache layer of a state by kind; `attention` makes that of keys and values."""
    if "keys" not in state:
        return BoundRecurrence(state)
    layer = attention(state["keys"], state["values"])
    return layer if len(state) == 2 else BoundHybrid(state, layer)
