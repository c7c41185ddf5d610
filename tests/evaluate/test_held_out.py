"""What an evaluation says about sequences that a student was trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdcache.cache import open_cache
from kdcache.config import build
from kdcache.dump import DumpConfig, dump_teacher
from kdcache.evaluate import evaluate_students
from kdcache.students import trained_on
from kdcache.students.run_file import RUN_FILE
from kdcache.train import TrainConfig, train_student
from kdcache.transcode import TranscodeConfig, transcode_cache
from tests.conftest import dump_settings


def train(cache: Path, output: Path, **settings: Any) -> str:
    config = {"cache": str(cache), "output": str(output), "student": {"size": "nano"}, "device": "cpu", "max_steps": 1}
    train_student(build(TrainConfig, config | settings), progress=False)
    return str(output)


def part(source: Path, output: Path, where: str) -> Path:
    transcode_cache(
        build(TranscodeConfig, {"source": str(source), "output": str(output), "where": where}), progress=False
    )
    return output


def evaluated(cache: Path, student: str, **settings: Any) -> Any:
    return evaluate_students(str(cache), [student], device="cpu", progress=False, **settings)


@pytest.fixture(scope="module")
def split(tmp_path_factory, dumped):
    """A cache in two parts, and a student of the first one."""
    path = tmp_path_factory.mktemp("split")
    middle = len(open_cache(dumped)) // 2
    first = part(dumped, path / "first", f"sequence < {middle}")
    second = part(dumped, path / "second", f"sequence >= {middle}")
    return {"first": first, "second": second, "student": train(first, path / "run"), "middle": middle}


def test_parts_of_one_cache_are_held_out_of_each_other(dumped, split):
    assert evaluated(split["second"], split["student"]).warnings == ()
    [row] = evaluated(split["second"], split["student"]).students
    assert row.num_trained_on == 0
    num = len(open_cache(split["first"]))
    [warning] = evaluated(split["first"], split["student"]).warnings
    assert warning.endswith(f"was trained on {num} of {num} sequences, so its numbers are not held out")
    [row] = evaluated(dumped, split["student"]).students
    assert row.num_trained_on == split["middle"]
    assert f"trained on {num} of {len(open_cache(dumped))} sequences, so" in row.warnings[0]
    assert row.warnings[0].endswith("not held out for these")


def test_filters_of_training_and_evaluation_are_compared_by_sequences(dumped, tmp_path):
    student = train(dumped, tmp_path / "run", where="sequence % 2 == 0")
    assert evaluated(dumped, student, where="sequence % 2 == 1").warnings == ()
    num = len(open_cache(dumped).where("sequence % 4 == 0"))
    [row] = evaluated(dumped, student, where="sequence % 4 == 0").students
    assert (row.num_trained_on, row.warnings[0].count(f"{num} of {num} sequences")) == (num, 1)


def test_a_corpus_that_was_cut_otherwise_is_compared_by_documents(dumped, split, teacher_dir, corpus_file, tmp_path):
    settings = dump_settings(tmp_path / "shorter", teacher_dir, corpus_file)
    settings["sequences"] = settings.get("sequences", {}) | {"max_length": 9}
    dump_teacher(build(DumpConfig, settings), progress=False)
    shorter, first = open_cache(tmp_path / "shorter"), open_cache(split["first"])
    known = set(first.sequences["document_id"].to_pylist())
    expected = sum(name in known for name in shorter.sequences["document_id"].to_pylist())
    [row] = evaluated(tmp_path / "shorter", split["student"]).students
    assert row.num_trained_on == expected
    assert 0 < expected < len(shorter)
    assert f"was trained on the documents of {expected} of {len(shorter)} sequences" in row.warnings[0]


def test_runs_without_hashes_are_judged_by_their_fingerprints(split, tmp_path):
    """As those of older versions, or where the file is damaged."""
    run = Path(split["student"])
    file = run / trained_on.TRAINED_ON_FILE
    kept, record = file.read_bytes(), (run / RUN_FILE).read_text()
    try:
        for data in (b"", kept[:-40], b"PK", None):
            file.unlink(missing_ok=True)
            if data is not None:
                file.write_bytes(data)
            [row] = evaluated(split["first"], str(run)).students
            assert (row.num_trained_on, row.warnings[0].count("this very cache")) == (None, 1)
            assert "a cache of the same texts" in evaluated(split["second"], str(run)).warnings[0]
        file.write_bytes(kept)
        old = json.loads(record)
        del old["cache"]["sequences"]
        (run / RUN_FILE).write_text(json.dumps(old))
        assert "a cache of the same texts" in evaluated(split["second"], str(run)).warnings[0]
    finally:
        file.write_bytes(kept)
        (run / RUN_FILE).write_text(record)


def test_of_many_sequences_a_sample_is_kept_and_the_overlap_is_estimated(dumped, tmp_path, monkeypatch):
    cache = open_cache(dumped)
    most = len(cache) // 2
    monkeypatch.setattr(trained_on, "MOST_HASHES", most)
    (tmp_path / RUN_FILE).write_text(json.dumps({"cache": {"fingerprint": "other", "corpus": "other"}}))
    trained_on.write_trained_on(tmp_path, cache, None)
    with np.load(tmp_path / trained_on.TRAINED_ON_FILE) as file:
        assert len(file["sequences"]) == most
    found = trained_on.overlap(str(tmp_path), cache, np.arange(len(cache)))
    assert found == trained_on.Overlap(len(cache), len(cache), "sequences", is_estimate=True)
    trained_on.write_trained_on(tmp_path, cache, np.arange(0, len(cache), 2))
    found = trained_on.overlap(str(tmp_path), cache, np.arange(len(cache)))
    assert found is not None
    assert abs(found.num_trained - len(cache) / 2) < len(cache) / 4
