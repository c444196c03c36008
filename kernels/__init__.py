"""Fusion: FX -> MLIR -> fused row kernels in Triton -> FX."""

from .fuse import FusionError, FusionReport, fuse_elementwise

__all__ = ["FusionError", "FusionReport", "fuse_elementwise"]
