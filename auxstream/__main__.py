"""The command line: `python -m auxstream demo`, also installed as `auxstream`."""

from __future__ import annotations

import argparse
import sys


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    from .runtime.errors import AuxstreamError

    parser = argparse.ArgumentParser(prog="auxstream", description="Branches of a model on auxiliary CUDA streams.")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="a Gemma-4 MoE decode step on one stream and on two, bit for bit")
    try:
        from .demo import add_arguments, run_demo

        add_arguments(demo)
        options = parser.parse_args(arguments)
        from rich.console import Console

        return run_demo(options, Console())
    except AuxstreamError as error:
        print(f"auxstream: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
