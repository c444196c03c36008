"""Benchmarks: each says what it measures and what it does not, and interleaves its variants in one run."""
