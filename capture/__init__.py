"""Capture: trace, mark, schedule, record, prove, replay."""

from .graphs import CapturedGraph, graph
from .proof import Report, verify

__all__ = ["CapturedGraph", "Report", "graph", "verify"]
