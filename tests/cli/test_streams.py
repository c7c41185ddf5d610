"""Standard streams that are closed, full or narrow, and signals that end a command."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from kdcache.cache import open_cache
from kdcache.cli import COMMANDS, RESUMABLE
from kdcache.config import build
from kdcache.dump import DumpConfig, dump_teacher
from kdcache.verify.stored import verify_cache
from tests.cache.test_writer import content_of
from tests.conftest import dump_settings


def start(python, *arguments, **options):
    return subprocess.Popen([python, "-m", "kdcache", *map(str, arguments)], text=True, **options)


@pytest.mark.parametrize(
    "arguments", [["inspect", "CACHE"], ["peek", "CACHE", "--json"], ["verify", "CACHE", "--quiet"], ["--help"]]
)
def test_whatever_reads_the_output_may_end(preloaded, dumped, arguments):
    arguments = [str(dumped) if argument == "CACHE" else argument for argument in arguments]
    reading, writing = os.pipe()
    os.close(reading)
    process = start(preloaded, *arguments, stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (141, ""), "as after SIGPIPE: what was not shown may have been a problem"

    with open("/dev/full", "w") as full:
        process = start(preloaded, *arguments, stdout=full, stderr=subprocess.PIPE)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert err == "Error: standard output: No space left on device; free some space, and run the same command again\n"


def test_a_broken_pipe_to_a_server_is_an_error(run, dumped, monkeypatch):
    import kdcache.inspect

    def inspect_cache(cache):
        raise BrokenPipeError(32, "Broken pipe", "s3://bucket/cache")

    monkeypatch.setattr(kdcache.inspect, "inspect_cache", inspect_cache)
    assert run("inspect", dumped).message() == "s3://bucket/cache: Broken pipe"


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-", "2>/dev/full", "2> >(true)"])
def test_a_stream_may_be_closed(dumped, closed):
    """The bars go to standard error; nothing that cannot be said there ends a command."""
    # A real Python: it has to find the streams closed when it starts.
    command = f"{sys.executable} -m kdcache verify {dumped} {closed}"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result
    assert "Traceback" not in result.stderr
    assert ("every byte is as written" in result.stdout) == (">&-" not in closed.split())


@pytest.mark.parametrize(
    ("environment", "encoding", "shown"),
    [
        ({"PYTHONIOENCODING": "cp1252"}, "cp1252", "naïve café, \\u6771"),
        (
            {"PYTHONIOENCODING": "", "LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
            "ascii",
            "na\\xefve caf\\xe9, \\u6771",
        ),
    ],
)
def test_a_narrow_encoding_loses_nothing(dumped, environment, encoding, shown):
    [number, *_] = open_cache(str(dumped)).find(document="texts.jsonl:6")
    # A real Python: the encoding is chosen when it starts.
    command = [sys.executable, "-m", "kdcache", "peek", str(dumped), "--sequence", str(number), "--count", "20"]
    for more in ([], ["--json"]):
        result = subprocess.run([*command, *more], capture_output=True, env={**os.environ, **environment}, timeout=60)
        assert result.returncode == 0, result.stderr
        text = result.stdout.decode(encoding)
        if more:
            text = json.loads(text)["text"].encode(encoding, "backslashreplace").decode(encoding)
        assert shown in text


# ------------------------------------------------------------------------------------------------------ signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_a_signal_ends_a_command_with_a_message(run, dumped, monkeypatch, command, number):
    import kdcache.inspect
    import kdcache.verify.stored

    def ended(*arguments, **options):
        try:
            os.kill(os.getpid(), number)
            time.sleep(60)
        finally:
            cleaned.append(True)

    cleaned = []
    monkeypatch.setattr(kdcache.inspect, "inspect_cache", ended)
    monkeypatch.setattr(kdcache.verify.stored, "verify_cache", ended)
    outcome = run(command, dumped)
    assert (outcome.code, outcome.out, outcome.err) == (128 + number, "", "Interrupted.\n")
    assert cleaned
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_signal_that_is_ignored_stays_ignored(run, dumped, monkeypatch):
    """nohup ignores SIGHUP."""
    import kdcache.inspect

    real = kdcache.inspect.inspect_cache
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        monkeypatch.setattr(kdcache.inspect, "inspect_cache", lambda cache: os.kill(os.getpid(), 1) or real(cache))
        assert run("inspect", dumped).code == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_only_commands_that_resume_are_said_to():
    for command in COMMANDS:
        source = Path(sys.modules["kdcache"].__file__).parent / "cli" / f"{command.replace('-', '_')}.py"
        notes = source.read_text() + (
            source.with_name("transfer.py").read_text() if command in ("push", "pull") else ""
        )
        assert ("resume" in notes) == (command in RESUMABLE), command


def test_a_terminated_dump_resumes(run, teacher_dir, corpus_file, tmp_path):
    corpus = tmp_path / "texts.jsonl"
    corpus.write_text(corpus_file.read_text() * 8)
    output, whole = tmp_path / "terminated", tmp_path / "whole"
    settings = {**dump_settings("", teacher_dir, corpus), "shard_positions": 40}
    (tmp_path / "dump.yaml").write_text(json.dumps(settings))
    command = ["dump-teacher", "--config", tmp_path / "dump.yaml", "--output", output, "--quiet"]

    def terminate():
        while len(list(output.glob("commits/*.json"))) < 2:
            time.sleep(0.002)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=terminate)
    thread.start()
    outcome = run(*command)
    thread.join()
    assert (outcome.code, outcome.out) == (143, "")
    assert outcome.err == "Interrupted. Finished work is kept; run the same command again to resume.\n"
    assert not (output / "manifest.json").exists(), "it was to be terminated before its end"
    assert not list(output.rglob("*.tmp"))
    assert run(*command).code == 0
    assert verify_cache(str(output), progress=False).ok
    dump_teacher(build(DumpConfig, {**settings, "output": str(whole)}), progress=False)
    assert content_of(output) == content_of(whole)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), r"out of memory \(no memory left\); use smaller batches"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
            r"out of memory \(Default.* smaller batches",
        ),
        (
            OSError(errno.EMFILE, "Too many open files", "a/b"),
            r"a/b: Too many open files; raise the limit \(ulimit -n\)",
        ),
    ],
)
def test_limits_of_the_machine(run, dumped, monkeypatch, error, message):
    import kdcache.inspect

    def inspect_cache(cache):
        raise error

    monkeypatch.setattr(kdcache.inspect, "inspect_cache", inspect_cache)
    assert re.match(message, run("inspect", dumped).message())
