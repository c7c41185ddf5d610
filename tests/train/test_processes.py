"""The command under the launchers that people use: two processes do the work of one, each reads its share of the cache.

As a script (``python -m tests.train.test_processes RECORD kdcache-arguments...``) it is the command, and records which
shards its process opened.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from kdcache.cache import open_cache
from kdcache.cache.layout import FIELDS
from tests.tiny import bpe_tokenizer, llama, make_cache, random_sequences
from tests.train_runs import relative_difference

TOKENIZER = bpe_tokenizer()
ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
LAUNCHERS = {
    "accelerate": [
        str(BIN / "accelerate"),
        "launch",
        "--multi_gpu",
        "--num_processes",
        "2",
        "--main_process_port",
        "0",
    ],
    "torchrun": [str(BIN / "torchrun"), "--standalone", "--nproc-per-node", "2"],
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    sequences = random_sequences(24, len(TOKENIZER), seed=1)
    folder = tmp_path_factory.mktemp("cache") / "c"
    return make_cache(folder, llama(len(TOKENIZER), seed=5), TOKENIZER, sequences, top_k=8, num_shards=6)


def command(cache, output, batch_sequences):
    options = ["train-student", "--cache", cache, "--student-size", "nano", "--output", output, "--device", "cpu"]
    options += ["--batch-sequences", batch_sequences, "--epochs", 2, "--set", "num_streams=2", "-q", "--json"]
    return [str(option) for option in options]


def run(*words):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def alone(tmp_path_factory, cache):
    output = tmp_path_factory.mktemp("alone") / "run"
    return output, run(sys.executable, "-m", "kdcache", *command(cache, output, 4))


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes_do_the_work_of_one(tmp_path, cache, alone, launcher):
    script = ["-m", "tests.train.test_processes", str(tmp_path / "opened")]
    output, one = alone
    two = run(*LAUNCHERS[launcher], *script, *command(cache, tmp_path / "two", 2))
    assert one["steps"] == two["steps"] == 12
    for name, value in one["losses"].items():
        assert two["losses"][name] == pytest.approx(value, rel=1e-4)
    weights = [AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (output, tmp_path / "two")]
    assert relative_difference(*weights) <= 1e-4

    opened = [json.loads((tmp_path / f"opened-{rank}-of-2").read_text()) for rank in range(2)]
    num_shards = open_cache(str(cache)).manifest.num_shards
    # In two epochs each process reads half of the shards each time, and says so to nobody but its own cache.
    assert [len(shards) for shards in opened] == [num_shards, num_shards]


def _main(record: str, arguments: list[str]) -> None:
    from kdcache.cache import layout
    from kdcache.cli import main

    opened: list[str] = []
    read = layout.read_object

    def recording(folder, item, where):
        if item.path.startswith(f"{FIELDS}/targets/"):
            opened.append(item.path)
        return read(folder, item, where)

    layout.read_object = recording
    sys.argv[1:] = arguments
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    rank, size = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    Path(f"{record}-{rank}-of-{size}").write_text(json.dumps(opened))


if __name__ == "__main__":
    _main(sys.argv[1], sys.argv[2:])
