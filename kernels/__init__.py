"""MLIR fusion lives here; not built yet."""
