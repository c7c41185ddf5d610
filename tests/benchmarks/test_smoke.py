"""Every benchmark runs in a tiny size and says what it should, so that none can rot."""

import json
import os
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
NAMES = {path.stem for path in (ROOT / "benchmarks").glob("*.py") if "def main()" in path.read_text()}


@pytest.fixture(scope="session")
def hidden_cache(teacher_dir: Path, corpus_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of the kind hidden, from which the benchmark of fidelity makes logits."""
    from kdcache.config import build
    from kdcache.dump import DumpConfig, dump_teacher

    path = tmp_path_factory.mktemp("hidden") / "cache"
    settings = {
        "output": str(path),
        "teacher": {"model": str(teacher_dir), "device": "cpu"},
        "corpus": {"paths": [str(corpus_file)]},
        "sequences": {"max_length": 16},
        "targets": {"kind": "hidden"},
    }
    dump_teacher(build(DumpConfig, settings), progress=False)
    return path


def options_of(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> list[str]:
    def fixture(fixture_name: str) -> str:
        return str(request.getfixturevalue(fixture_name))

    options = {
        "dump": lambda: (
            f"--teacher {fixture('teacher_dir')} --dtype float32 --positions 200 --rounds 1 --max-length 32 --top-k 4"
        ),
        "fidelity": lambda: f"{fixture('hidden_cache')} --positions 200 --output {tmp_path / 'docs'}",
        # A cache may be its own held-out cache here: the benchmark then warns, and that is all.
        "students": lambda: (
            f"{fixture('hidden_cache')} {fixture('hidden_cache')} --teacher {fixture('teacher_dir')} "
            f"--work {tmp_path / 'work'} --student-size nano --seeds 0 1 --jobs 1 --docs {tmp_path}"
        ),
        "curricula": lambda: (
            f"{fixture('hidden_cache')} {fixture('hidden_cache')} --work {tmp_path / 'work'} --student-size nano "
            f"--seeds 0 --jobs 1 --docs {tmp_path}"
        ),
        "sweep": lambda: (
            f"--teacher {fixture('teacher_dir')} --documents 2 --max-length 32 --student-size nano --students 2 "
            f"--jobs 1 --docs {tmp_path}"
        ),
        "step": lambda: (
            f"--sizes tiny --ways plain kdcache online --rounds 1 --sequences 2 --length 16 --vocab-size 290 --top-k 4 "
            f"--teacher {fixture('teacher_dir')} --docs {tmp_path}"
        ),
        "reader": lambda: (
            "--positions 600 --length 50 --vocab-size 500 --rounds 1 --shard-positions 200 --top-k 4 --memory"
        ),
    }
    return options[name]().split()


@pytest.mark.parametrize("name", sorted(NAMES))
def test_benchmark_runs_and_writes_json(
    name: str, request: pytest.FixtureRequest, tmp_path: Path, preloaded: str
) -> None:
    out = tmp_path / "result.json"
    command = [preloaded, "-m", f"benchmarks.{name}", *options_of(name, request, tmp_path), "--json", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert result["machine"]["cores"] >= 1
    assert len(result["rows"]) >= 3
    assert all(row[column] > 0 for row in result["rows"] for column in row if column.endswith("tokens/s"))
    assert any(column.endswith("tokens/s") for column in result["rows"][0])
    assert "tokens/s" in done.stdout


def test_fidelity_writes_its_page_and_plot(hidden_cache: Path, tmp_path: Path, preloaded: str) -> None:
    from benchmarks.peers import PEERS
    from kdcache.presets import PRESETS

    out = tmp_path / "result.json"
    command = [preloaded, "-m", "benchmarks.fidelity", str(hidden_cache), "--output", str(tmp_path)]
    done = subprocess.run([*command, "--json", str(out)], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "fidelity.md").read_text()
    for name in (*PRESETS, *PEERS):
        assert f"| `{name}` |" in page
    assert "{" not in page
    assert str(hidden_cache.parent) not in page
    assert (tmp_path / "fidelity.png").read_bytes().startswith(b"\x89PNG")

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    result = json.loads(out.read_text(), parse_constant=refuse)
    layouts = result["layouts"]
    assert layouts["exact"]["codec_kl"] == 0
    assert layouts["hidden"]["full_kl"]["full"] < 1e-3
    # The same samples, so the same target.
    assert layouts["sampling"]["batch_mean_error"]["samples"] == pytest.approx(
        layouts["sampled"]["batch_mean_error"]["samples"], rel=1e-3
    )
    assert layouts["megatron"]["full_kl"]["uniform"] == pytest.approx(layouts["fp16"]["full_kl"]["uniform"], rel=0.01)


def test_fidelity_needs_a_cache_that_holds_states(dumped: Path, tmp_path: Path, preloaded: str) -> None:
    command = [preloaded, "-m", "benchmarks.fidelity", str(dumped), "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "kdcache dump-teacher --targets hidden" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
