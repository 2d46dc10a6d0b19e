"""Benchmarks (`make bench`): files bench_*.py, which an ordinary run does not collect."""
