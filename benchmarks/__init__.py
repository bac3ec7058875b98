"""Benchmarks: `python -m benchmarks` writes results/*.json and results/README.md."""
