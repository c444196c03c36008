"""The command line: `python -m auxstream demo`, also installed as `auxstream`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    from .runtime.errors import AuxstreamError

    parser = argparse.ArgumentParser(prog="auxstream", description="Branches of a model on auxiliary CUDA streams.")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="a Gemma-4 MoE decode step on one stream and on two, bit for bit")
    try:
        from .demo import run_demo

        _add_demo_arguments(demo)
        options = parser.parse_args(arguments)
        from rich.console import Console

        return run_demo(options, Console())
    except AuxstreamError as error:
        print(f"auxstream: {error}", file=sys.stderr)
        return 2


def _add_demo_arguments(parser: argparse.ArgumentParser) -> None:
    """The demo's command line."""
    parser.add_argument("--layers", type=_count, help="decoder layers (default 2; 30 with --size full)")
    parser.add_argument(
        "--size",
        choices=("tiny", "real", "full"),
        help="tiny: small dimensions (default without a GPU); real: the layers of Gemma-4-26B-A4B (default on a GPU); "
        "full: real, and all 30 of them",
    )
    parser.add_argument("--batch", type=_count, default=1, help="sequences per step")
    parser.add_argument("--replays", type=_count, help="replays compared bit for bit (default: 1000 on a GPU, else 40)")
    parser.add_argument("--rounds", type=_count, default=15, help="timing rounds (GPU)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPU if there is one")
    parser.add_argument(
        "--fusion",
        nargs="+",
        choices=("unfused", "caller", "everywhere"),
        help="what runs as fused kernels: nothing, what the marker leaves (compile's default), or all; default: each "
        "(with AUXSTREAM_FUSION=off, nothing)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the inputs and delays")
    parser.add_argument("--json", type=_new_file, help="write the figures here")


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def _new_file(text: str) -> Path:
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():  # found out now, not when the work is done
        raise argparse.ArgumentTypeError(f"no file can be made at {text}")
    return path


if __name__ == "__main__":
    sys.exit(main())
