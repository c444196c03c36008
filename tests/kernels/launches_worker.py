"""Launches Triton kernels on a machine that may have no GPU, noting them. Run by `test_triton_accesses`.

Everything is Triton's own but for the driver, which only counts: it hands out CUfunctions, and its launcher calls the
hooks as the real ones do. Prints one JSON object: what was known of each launched kernel, and what was left behind.
"""

from __future__ import annotations

import itertools
import json
import sys
from dataclasses import asdict
from typing import Any

import torch

from auxstream.kernels.triton_accesses import TritonAccesses, TritonLaunches


class Driver:
    """What Triton asks of a driver on the way to a launch. `launched` are the CUfunctions, in order."""

    def __init__(self) -> None:
        self.utils = self
        self.launched: list[int] = []
        self._functions = itertools.count(1000)

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448}

    def load_binary(self, *binary: Any) -> tuple[object, int, int, int, int]:
        return object(), next(self._functions), 32, 0, 1024

    def unload_module(self, module: object) -> None: ...

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        def launch(
            x: int, y: int, z: int, stream: int, function: int, packed: Any, told: Any, *hooks_and_args: Any
        ) -> None:
            enter, leave, *_ = hooks_and_args
            enter(told)
            self.launched.append(function)
            leave(told)

        return launch


def plain(found: TritonAccesses | None) -> Any:
    return None if found is None else asdict(found)


def launch() -> Driver:
    """Launch two kernels, for the first time and once more."""
    import triton
    from triton_cases import CASES

    driver = Driver()
    triton.runtime.driver.set_active(driver)
    x, y, out = torch.zeros(3, 64)
    for _ in range(2):
        CASES["elementwise"].kernel[(1,)](x, y, out, 64)
        CASES["in_place"].kernel[(1,)](x, 3)
    return driver


def early() -> dict[str, Any]:
    """Triton is there before launches are noted; so is somebody else's hook."""
    import triton
    from triton.compiler import CompiledKernel

    before, told = vars(CompiledKernel)["launch_metadata"], []
    triton.knobs.runtime.launch_enter_hook.add(lambda metadata: told.append(metadata.get()["name"]))
    with TritonLaunches() as launches:
        driver = launch()
    known = [plain(launches.of(function)) for function in driver.launched]
    unknown = plain(launches.of(7))
    with TritonLaunches() as others:
        pass
    return {
        "known": known,
        "unknown": unknown,
        "not launched meanwhile": plain(others.of(driver.launched[0])),
        "told": told,
        "put back": vars(CompiledKernel)["launch_metadata"] is before,
    }


def late() -> dict[str, Any]:
    """Triton is imported, and its kernels are made, while launches are noted."""
    with TritonLaunches() as launches:
        imported = "triton" in sys.modules
        driver = launch()
    return {"imported": imported, "known": [plain(launches.of(function)) for function in driver.launched]}


if __name__ == "__main__":
    print(json.dumps({"early": early, "late": late}[sys.argv[1]]()))
