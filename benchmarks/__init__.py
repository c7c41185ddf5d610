"""Benchmarks: ``python -m benchmarks.NAME`` prints a table; ``--json FILE`` also writes it as JSON.

Machines are shared and noisy, so every figure that matters is a ratio between things measured in turns in one run.
"""
