"""The engines see what they are there to see: every kind of failure is planted, and found."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from kdcache.storage import folder
from tests.dump.fake import BigramTeacher, run_dump
from tests.reliability import corruption, kills, manifests
from tests.reliability.children import run_cases
from tests.reliability.corruption import Corruption
from tests.reliability.manifests import Manifests
from tests.reliability.verdicts import FAILURES, Tally, Verdict
from tests.reliability.works import Work


class OneCache:
    """A library of one cache."""

    names = ("exact",)

    def __init__(self, path: Path) -> None:
        self.path = path

    def cache(self, name: str) -> Path:
        return self.path


def tally_of(engine, cases, tmp_path) -> Tally:
    tally = Tally(engine.name)
    for result in run_cases(engine, cases, jobs=2, work=tmp_path):
        tally.add(result)
    return tally


def verdicts_of(tally: Tally) -> set[Verdict]:
    return {finding.verdict for finding in tally.findings}


@pytest.fixture
def engine(dumped):
    return Corruption(OneCache(dumped), 0)


def test_every_case_is_counted_once_and_repeats(engine, dumped, tmp_path):
    first, second = (tally_of(Corruption(OneCache(dumped), 0), range(20), tmp_path) for _ in range(2))
    assert first.num_cases == 20
    assert first.counts == second.counts
    assert sum(number for (step, _), number in first.counts.items() if step == "read") == 20
    assert sum(number for (step, _), number in first.counts.items() if step == "verify --deep") == 4
    one = tally_of(engine, [first.findings[0].case], tmp_path).findings if first.findings else []
    assert one == first.findings[:1]


def test_a_cache_that_is_called_sound_is_found(engine, monkeypatch, tmp_path):
    report = type("Report", (), {"problems": []})
    monkeypatch.setattr(corruption, "verify_cache", lambda path, **options: report)
    tally = tally_of(engine, range(6), tmp_path)
    assert [finding.verdict for finding in tally.findings].count(Verdict.UNSEEN) == 6


def crash() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def fail() -> None:
    raise ValueError("not an error for users")


def exhaust() -> None:
    bytearray(64 << 30)


def stray() -> None:
    Path("../victim/keep.txt").write_text("changed")


def remove() -> None:
    Path("../up").unlink()


@pytest.mark.parametrize(
    ("fault", "verdict"),
    [
        (lambda: {"batch": "other"}, Verdict.SILENT),
        (fail, Verdict.TRACEBACK),
        (crash, Verdict.TRACEBACK),
        (exhaust, Verdict.MEMORY),
        (lambda: time.sleep(60), Verdict.HANG),
        (stray, Verdict.OUTSIDE),
        (remove, Verdict.OUTSIDE),
    ],
    ids=["silent", "error", "signal", "memory", "hang", "write", "removal"],
)
def test_reading_that_goes_wrong_is_found(engine, monkeypatch, tmp_path, fault, verdict):
    monkeypatch.setattr(corruption, "read_everything", lambda path: fault() or {})
    engine.limit_s = 1.0
    tally = tally_of(engine, range(2), tmp_path)
    assert verdict in verdicts_of(tally)
    assert tally.num_cases == 2  # the case after it runs in another process
    assert verdict in FAILURES


def test_a_command_that_goes_wrong_is_found(dumped, monkeypatch, tmp_path):
    engine = Manifests(OneCache(dumped), 0)
    real = manifests._command

    def command(arguments):
        if arguments[0] == "peek":
            return "title \x1b]0;x"
        if arguments[0] == "pull":
            raise KeyError("shards")
        return real(arguments)

    monkeypatch.setattr(manifests, "_command", command)
    tally = tally_of(engine, range(2), tmp_path)
    found = {(finding.verdict, finding.what.split(":")[0]) for finding in tally.findings}
    assert {(Verdict.TERMINAL, "peek"), (Verdict.TRACEBACK, "pull"), (Verdict.TRACEBACK, "pull --shards")} <= found


def test_every_member_of_a_manifest_is_replaced(dumped):
    engine = Manifests(OneCache(dumped), 0)
    members = {".".join(str(key) for key in path) for _, path in engine._leaves}
    # Of lists one item stands for all of them.
    assert {"teacher.identity.sha256", "targets.scalars", "", "corpus.num_documents"} <= members
    assert any(member.startswith("shards.") and member.endswith("objects.targets.path") for member in members)
    assert len(engine._leaves) > 100


def test_names_are_replaced_wherever_they_stand(dumped, tmp_path):
    cache = Path(shutil.copytree(dumped, tmp_path / "cache"))
    manifest = json.loads((cache / "manifest.json").read_text())
    assert {"targets", "hidden-1", "tokenizer.json"} <= set(manifests.names_in(manifest))
    new = "hidden-1/../../../victim"
    changed = manifests.renamed(manifest, "hidden-1", new)
    path = changed["shards"][0]["objects"][new]["path"]
    assert path.startswith(f"fields/{new}/000000-")
    assert "hidden-1" not in json.dumps(changed).replace(new, "")
    manifests.move_files(cache, "hidden-1", new, tmp_path)
    assert (cache / "fields" / "hidden-1").is_dir()
    assert (cache / path).read_bytes() == (cache / manifest["shards"][0]["objects"]["hidden-1"]["path"]).read_bytes()
    assert (tmp_path / "victim").is_dir()
    attempt = manifest["shards"][0]["attempt"]
    assert attempt not in json.dumps(manifests.renamed(manifest, attempt, "other"))


def test_work_that_is_lost_is_found(corpus_file, monkeypatch, tmp_path):
    """A writer without temporary names leaves half of a file where it is looked for."""
    dump = Work("dump", "top-k", lambda output: run_dump(corpus_file, output, BigramTeacher(), shard_positions=110))
    monkeypatch.setattr(kills, "works", lambda library, bucket=None: [dump])
    (tmp_path / "library").mkdir()
    library = type("Library", (), {"root": tmp_path / "library"})
    (tmp_path / "sound").mkdir()
    engine = kills.EveryOperation(library, 0)
    assert len(engine) > 50
    sound = tally_of(engine, range(4), tmp_path / "sound")
    assert sound.findings == []
    assert sound.counts["dump", Verdict.WORKED] == 4

    def write(path: Path, data: bytes) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    monkeypatch.setattr(folder, "_write_whole", write)
    broken = tally_of(kills.EveryOperation(library, 0), range(12), tmp_path / "broken")
    assert verdicts_of(broken) == {Verdict.LOST}, broken.findings
