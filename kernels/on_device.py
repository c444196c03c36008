"""Ops of ours on the device of their tensors, whichever is current.

Enters: an op's implementation. Leaves: one that makes the device of its first tensor the current one, as torch's own
ops do: Triton launches on the current device, on its current stream, wherever the memory lies.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def on_its_device(run: Callable[..., Any]) -> Callable[..., Any]:
    """`run`, whose first argument is a tensor on a GPU, or a list that begins with one."""

    def there(*arguments: Any) -> Any:
        first: Any = arguments[0][0] if isinstance(arguments[0], list | tuple) else arguments[0]
        device = first.get_device()
        if device == torch.cuda.current_device():
            return run(*arguments)
        with torch.cuda.device(device):
            return run(*arguments)

    return there
