"""A short form of ``python -m tests.reliability``, with a fixed seed: two minutes instead of half an hour."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SEED = "20"


@pytest.mark.slow
@pytest.mark.parametrize(
    "cases",
    ["--corruptions 800", "--manifests 160", "--operations 70", "--kills 5"],
    ids=lambda cases: cases.split()[0][2:],
)
def test_nothing_is_lost_or_silent(cases, tmp_path, preloaded):
    command = [
        preloaded,
        "-m",
        "tests.reliability",
        "--seed",
        SEED,
        "--jobs",
        "1",
        "--work",
        str(tmp_path),
        *cases.split(),
    ]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert found.returncode == 0, found.stdout + found.stderr[-3000:]
    assert "no failures" in found.stdout
