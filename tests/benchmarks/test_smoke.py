"""Every benchmark runs in a tiny size and says what it should, so that none can rot."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NAMES = {path.stem for path in (ROOT / "benchmarks").glob("*.py") if "def main()" in path.read_text()}


def options_of(name: str, teacher_dir: Path) -> list[str]:
    options = {
        "dump": f"--teacher {teacher_dir} --dtype float32 --positions 200 --rounds 1 --max-length 32",
        "reader": "--positions 600 --length 50 --vocab-size 500 --rounds 1 --shard-positions 200",
    }
    return [*options[name].split(), "--top-k", "4"]


@pytest.mark.parametrize("name", sorted(NAMES))
def test_benchmark_runs_and_writes_json(name: str, teacher_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    command = [sys.executable, "-m", f"benchmarks.{name}", *options_of(name, teacher_dir), "--json", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert result["machine"]["cores"] >= 1
    assert len(result["rows"]) >= 3
    assert all(row["tokens/s"] > 0 for row in result["rows"])
    assert "tokens/s" in done.stdout
