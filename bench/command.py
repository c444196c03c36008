"""The command line that all benchmarks share: rounds, a limit of time, a quick form, JSON.

Enters: a benchmark's docstring; what `--quick` puts in the place of defaults, which what is given still overrides; the
devices it runs on. Leaves: options, with the `clock` of that limit; or an error if there is no such device here.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch

from ..runtime.errors import AuxstreamError
from .budget import Clock

Device = Literal["cuda", "cpu"]


class CommandLine(argparse.ArgumentParser):
    """A benchmark's command line.

    Args:
        doc: the module's docstring.
        rounds: how often each variant is timed, unless said otherwise; None: there are no rounds.
        limit: seconds that all may take, unless said otherwise.
        quick: values of options under `--quick`.
        devices: on which it runs; the first is the default.
    """

    def __init__(
        self,
        doc: str | None,
        *,
        rounds: int | None,
        limit: float,
        quick: Mapping[str, Any],
        devices: Sequence[Device] = ("cuda",),
    ) -> None:
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
        self._quick = quick
        self._devices = devices
        said = ", ".join(f"{name.replace('_', '-')} {_told(value)}" for name, value in quick.items())
        if rounds is not None:
            self.add_argument("--rounds", type=_several, default=rounds, help=f"timing rounds (default {rounds})")
        self.add_argument(
            "--limit", type=float, default=limit,
            help=f"seconds in all (default {limit:.0f}); what does not fit is left out, and named",
        )  # fmt: skip
        self.add_argument("--quick", action="store_true", help=f"unless given: {said}")
        self.add_argument("--json", help="write the figures here")
        if len(devices) > 1:
            self.add_argument("--device", choices=devices, default=devices[0], help=f"default: {devices[0]}")
        else:
            self.set_defaults(device=devices[0])

    def options(self, arguments: Sequence[str] | None) -> argparse.Namespace:
        """What was given, with the clock started. Raises AuxstreamError if a GPU is asked for and there is none."""
        options = self.parse_args(arguments)
        if options.quick:
            self.set_defaults(**self._quick)
            options = self.parse_args(arguments)
        if options.device == "cuda" and not torch.cuda.is_available():
            remedy = "run it where there is one"
            if "cpu" in self._devices:
                remedy += "; `--device cpu` tries the code, where times mean nothing"
            raise AuxstreamError("this benchmark measures a GPU", came="none", remedy=remedy)
        options.clock = Clock.of(torch.device(options.device), options.limit)
        return options


def _several(text: str) -> int:
    number = int(text)
    if number < 2:
        raise argparse.ArgumentTypeError(f"{number} is less than 2: there would be no spread")
    return number


def _told(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
