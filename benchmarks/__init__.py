"""Benchmarks: ``python -m benchmarks.NAME`` prints a table; ``--json FILE`` also writes it as JSON.

Machines are shared and noisy. So results are ratios between ways that are measured in turns within one run.
"""
