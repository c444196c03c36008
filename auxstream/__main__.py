"""The command line, `auxstream` or `python -m auxstream`: demo, run, verify, trace, bench, doctor."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    from .runtime.errors import AuxstreamError

    parser = argparse.ArgumentParser(prog="auxstream", description="Branches of a model on auxiliary CUDA streams.")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="a Gemma-4 MoE decode step on one stream and on two, bit for bit")
    _add_demo_arguments(demo)
    demo.set_defaults(run=_demo)
    run = commands.add_parser(
        "run",
        help="your model's decode step on one stream and on two, bit for bit",
        description="Compiles the decode step of a causal LM twice, from one graph and with the same kernels: on one "
        "stream, and with branches (--overlap; by default shared experts) on auxiliary streams; runs prompts through "
        "both. Which of these pay is not measured here: `compile` does that. Exit code: 0 the same "
        "bits, and proved; 1 not; 2 an error. Nothing is downloaded.",
    )
    _add_run_arguments(run)
    run.set_defaults(run=_run)
    verify = commands.add_parser(
        "verify",
        usage="auxstream verify [--json FILE] [--picture FOLDER] SCRIPT [ARGS...]",
        help="run a script, and check every CUDA graph it captures for cross-stream races",
        description="Runs a script as python would, and checks every graph that it captures with torch.cuda.graph or "
        "auxstream.graph. Exit code: 0 all proved, 1 a race or something unproved, 2 the script failed.",
    )
    _add_verify_arguments(verify)
    verify.set_defaults(run=_verify)
    trace = commands.add_parser(
        "trace",
        usage="auxstream trace [--to FOLDER] [--replays N] (demo | SCRIPT) [ARGS...]",
        help="profile graph replays: what overlapped, as a picture, a Perfetto trace and a table",
        description="Runs the demo, or a script as python would, and traces the CUDA graphs that it replays: which "
        "kernel ran when, on which lane, in which region, and what was hidden. Exit code: 0 traced, 1 nothing to "
        "trace, 2 the script failed. Needs a GPU.",
    )
    _add_trace_arguments(trace)
    trace.set_defaults(run=_trace)
    bench = commands.add_parser(
        "bench",
        help="measure everything, against what one would use instead",
        description="Runs benchmarks, each in a process of its own and within a time limit. Exit code: 0 all that "
        "could run here did, 1 something failed or nothing could run, 2 an error. See bench/README.md.",
    )
    _add_bench_arguments(bench)
    bench.set_defaults(run=_bench)
    doctor = commands.add_parser(
        "doctor",
        help="what is here, what works here, and what to do about the rest",
        description="Tries each capability by using it, and shows versions, devices, and the settings in force. "
        "Exit code: 0 what auxstream needs here works, 1 it does not.",
    )
    doctor.add_argument("--json", type=_new_file, metavar="FILE", help="write everything here")
    doctor.set_defaults(run=_doctor)
    options = parser.parse_args(arguments)
    try:
        return options.run(options)
    except AuxstreamError as error:
        print(f"auxstream: {error}", file=sys.stderr)
        return 2


def _demo(options: argparse.Namespace) -> int:
    from rich.console import Console

    from .demo import run_demo

    return run_demo(options, Console())


def _run(options: argparse.Namespace) -> int:
    from .run import run_model

    return run_model(options)


def _verify(options: argparse.Namespace) -> int:
    from .verify_script import verify_script

    _say_passed_on("verify", options.arguments, "--json", "--picture")
    return verify_script(options.script, options.arguments, to=options.json, pictures=options.picture)


def _trace(options: argparse.Namespace) -> int:
    from .trace_command import trace_command

    _say_passed_on("trace", options.arguments, "--to", "--replays")
    return trace_command(options.what, options.arguments, to=options.to, replays=options.replays)


def _say_passed_on(command: str, arguments: Sequence[str], *own: str) -> None:
    """Options of the command's own that stand behind the script go to the script: that may be meant, or not."""
    for name in own:
        if any(argument.partition("=")[0] == name for argument in arguments):
            print(
                f"auxstream: {name} stands behind the script, so the script gets it; for `auxstream {command}` it "
                f"belongs in front: auxstream {command} {name} ... SCRIPT",
                file=sys.stderr,
            )


def _add_trace_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `trace`. What follows the script is the script's own."""
    parser.add_argument("--to", type=_folder, metavar="FOLDER", default=Path("auxstream-trace"), help="write here")
    parser.add_argument("--replays", type=_count, default=20, metavar="N", help="profiled, of each graph (default 20)")
    parser.add_argument("what", metavar="demo|SCRIPT", help="demo --help: its own arguments")
    _add_rest(parser)


def _bench(options: argparse.Namespace) -> int:
    from .bench.suite import run_bench

    return run_bench(options)


def _add_bench_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `bench`."""
    parser.add_argument("names", nargs="*", metavar="NAME", help="benchmarks, by name; default: all")
    parser.add_argument("--quick", action="store_true", help="short forms of the main ones: five minutes on a GPU")
    parser.add_argument("--list", action="store_true", help="say what there is")
    parser.add_argument(
        "--json",
        type=_results,
        metavar="PATH",
        help="write all figures into this file (.json), or a file each in this folder",
    )
    parser.add_argument("--compare", nargs=2, type=Path, metavar="RESULTS", help="two of those, side by side")


def _doctor(options: argparse.Namespace) -> int:
    from .doctor import doctor

    return doctor(options.json)


def _add_verify_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `verify`. What follows the script is the script's own."""
    parser.add_argument("--json", type=_new_file, metavar="FILE", help="write all reports here")
    parser.add_argument("--picture", type=_folder, metavar="FOLDER", help="draw each graph here, as SVG")
    parser.add_argument("script", type=_script, metavar="SCRIPT")
    _add_rest(parser)


def _add_rest(parser: argparse.ArgumentParser) -> None:
    rest = parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="ARGS", help="the script's own arguments")
    rest.required = False  # there may be none, and a message about a missing SCRIPT should not ask for them


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


def _add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `run`."""
    parser.add_argument(
        "--model",
        required=True,
        metavar="PATH_OR_CONFIG",
        help="a folder with config.json and safetensors; a config.json by itself, or gemma4-tiny, or gemma4: random "
        "weights",
    )
    prompts = parser.add_mutually_exclusive_group()
    prompts.add_argument("--prompts", type=_text_file, metavar="FILE", help="a prompt in each line")
    prompts.add_argument(
        "--prompt", nargs="+", metavar="TEXT", help="prompts: text, or token ids as '[1, 2, 3]'; default: random ids"
    )
    parser.add_argument("--tokens", type=_count, default=32, help="new tokens for each prompt (default 32)")
    parser.add_argument("--batch", type=_count, default=1, help="sequences per step (default 1)")
    parser.add_argument("--context", type=_count, help="positions of the caches (default: as many as are needed)")
    parser.add_argument("--layers", type=_count, help="only the first layers of the model")
    parser.add_argument(
        "--overlap",
        default="",
        metavar="RULES",
        help="which branches run on lanes, as '*=off,layers.*.shared=on' (default: shared experts; AUXSTREAM_OVERLAP "
        "comes on top)",
    )
    parser.add_argument("--bisect", action="store_true", help="if bits differ, find the regions that make them")
    parser.add_argument("--retries", type=_count, default=3, help="runs in which a difference may show (default 3)")
    parser.add_argument("--rounds", type=_several, default=9, help="timing rounds (GPU; default 9)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPU if there is one")
    parser.add_argument("--seed", type=int, default=0, help="of random weights and ids")
    parser.add_argument("--json", type=_new_file, metavar="FILE", help="write everything here")


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def _several(text: str) -> int:
    number = int(text)
    if number < 2:
        raise argparse.ArgumentTypeError(f"{number} is less than 2")
    return number


def _text_file(text: str) -> Path:
    path = Path(text)
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"there is no file {text}; expected one with a prompt in each line")
    return path


def _new_file(text: str) -> Path:
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():  # found out now, not when the work is done
        raise argparse.ArgumentTypeError(f"no file can be made at {text}")
    return path


def _folder(text: str) -> Path:
    path = Path(text)
    if not path.is_dir() and (path.exists() or not path.parent.is_dir()):
        raise argparse.ArgumentTypeError(f"no folder can be made at {text}")
    return path


def _results(text: str) -> Path:
    """A file for all, or a folder for a file each: by its name."""
    return (_new_file if text.endswith(".json") else _folder)(text)


def _script(text: str) -> Path:
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder; expected a Python script")
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"there is no file {text}")
    return path


if __name__ == "__main__":
    sys.exit(main())
