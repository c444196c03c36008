"""Capture: trace, mark, insert, record, prove, replay."""

from .branches import find_branches
from .compiler import CompiledModel, compile
from .graphs import CapturedGraph, graph
from .launches import watch
from .mark import mark_multi_stream_moe_shared_experts
from .options import Options
from .proof import Report, verify
from .schedule import insert_regions
from .steps import Piece, verify_step
from .switches import adopt_switches

__all__ = [
    "CapturedGraph",
    "CompiledModel",
    "Options",
    "Piece",
    "Report",
    "adopt_switches",
    "compile",
    "find_branches",
    "graph",
    "insert_regions",
    "mark_multi_stream_moe_shared_experts",
    "verify",
    "verify_step",
    "watch",
]
