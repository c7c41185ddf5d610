"""Control characters and marks of direction in what strangers wrote reach no terminal, whatever command shows them."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import kdcache
from kdcache.cli import COMMANDS

#: Title, clear screen, colour (C0 and C1), bell, override of direction, separator, back space.
EVIL = "\x1b]0;PWN\x07\x1b[2J\x9b31m\u202e\u2028\x08\x7f"
UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2028\u2029\u2066-\u2069\ud800-\udfff]")
TRAIN = ["--cache", "CACHE", "--student-size", "nano", "--device", "cpu", "--max-steps", "1"]
SOURCES = ["--teacher", "TEACHER", "--corpus", "CORPUS", "--max-length", "32", "--device", "cpu"]

#: What every command can be made to show: results, dry runs and, at the end, errors.
LINES = {
    "estimate": [[*SOURCES, "--positions", "20", "--preset", "compact"]],
    "write-targets": [["--teacher", "TEACHER", "--corpus", "CORPUS", "--output", "OUT.jsonl"]],
    "dump-teacher": [
        [*SOURCES, "--output", "OUT/dump", "--dry-run"],
        [*SOURCES, "--output", "OUT/dump"],
        [*SOURCES, "--output", "OUT/dump2", "--text-field", EVIL],
    ],
    "transcode": [
        ["CACHE", "OUT/small", "--top-k", "2", "--dry-run"],
        ["CACHE", "OUT/small", "--top-k", "2"],
        ["CACHE", "OUT/smaller", "--where", f"{EVIL} == 1"],
    ],
    "train-student": [[*TRAIN, "--output", "OUT/run", "--dry-run"], [*TRAIN, "--output", "OUT/run"]],
    "sweep": [["SWEEP", "--dry-run"], ["NONE"]],
    "evaluate": [["--cache", "CACHE", "--student", "TEACHER", "--device", "cpu"]],
    "inspect": [["CACHE"], ["NONE"]],
    "verify": [["CACHE"], ["NONE"], ["DAMAGED"]],
    "push": [["CACHE", "OUT/pushed"], ["CACHE", "OUT/part", "--fields", EVIL]],
    "pull": [["CACHE", "OUT/pulled"], ["NONE", "OUT/none"]],
    "peek": [["CACHE"], ["CACHE", "--select", EVIL], ["CACHE", "--sequence", "99"]],
}


@pytest.fixture(scope="module")
def places(tmp_path_factory, teacher_dir):
    """Teacher, corpus and cache of a stranger, in a directory with a name of theirs."""
    from kdcache.config import build
    from kdcache.dump import DumpConfig, dump_teacher
    from tests.conftest import dump_settings

    root = tmp_path_factory.mktemp("stranger") / EVIL
    teacher = Path(shutil.copytree(teacher_dir, root / f"teacher{EVIL}"))
    corpus = root / f"texts{EVIL}.jsonl"
    texts = [f"hello {EVIL} world, the cat sat", f"{EVIL} the cat sat on the mat", f"a\r\x00b {EVIL}"]
    rows = [{"text": text, f"source{EVIL}": f"page {EVIL}", "id": f"{n}{EVIL}"} for n, text in enumerate(texts)]
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = dump_settings(root / "cache", teacher, corpus)
    settings["corpus"]["licence"] = f"MIT {EVIL}"
    dump_teacher(build(DumpConfig, settings), progress=False)
    damaged = Path(shutil.copytree(root / "cache", root / "damaged"))
    next((damaged / "fields/targets").iterdir()).unlink()
    (root / "sweep.yaml").write_text(
        json.dumps(
            {
                "output": str(root / "out/sweep"),
                "base": {"cache": str(root / "cache"), "student": {"size": "nano"}, "max_steps": 1},
                "runs": [{"name": "a"}, {"name": "b", "set": {"seed": 1}}],
            }
        )
    )
    names = {"CACHE": "cache", "DAMAGED": "damaged", "NONE": "none", "SWEEP": "sweep.yaml", "OUT": "out"}
    paths = {name: root / path for name, path in names.items()} | {"TEACHER": teacher, "CORPUS": corpus}
    return {name: str(path) for name, path in paths.items()}


def shown(outcome):
    """What reached the terminal, without the carriage returns that draw bars again."""
    return outcome.out + outcome.err.replace("\r", "")


@pytest.mark.parametrize("command", COMMANDS)
def test_no_raw_control_character_is_shown(run, places, command):
    escaped = 0
    for line in LINES[command]:
        arguments = [re.sub("^[A-Z]+", lambda match: places.get(match[0], match[0]), part) for part in line]
        for more in ([], ["--json"]):
            outcome = run(command, *arguments, *more)
            text = shown(outcome)
            assert "Traceback" not in text
            assert not UNSAFE.search(text), (line, more, text)
            escaped += "\\x1b]0;PWN\\x07" in text
            if more and outcome.code == 0:
                assert outcome.out.isascii()
                assert isinstance(json.loads(outcome.out), dict)
    assert escaped, "the command was meant to show something of a stranger's"


def test_json_holds_the_strings_as_they_are(run, places):
    found = json.loads(run("inspect", places["CACHE"], "--json").out)
    assert found["corpus"]["licence"] == f"MIT {EVIL}"
    assert found["teacher"]["name"] == f"teacher{EVIL}"
    peeked = json.loads(run("peek", places["CACHE"], "--sequence", 0, "--json").out)
    assert peeked["metadata"][f"source{EVIL}"] == f"page {EVIL}"


def test_warnings_log_records_and_tracebacks_are_escaped(preloaded, places):
    code = f"""
import logging, sys, warnings
import kdcache.inspect
from kdcache.cli import main
def inspect_cache(cache):
    logging.getLogger("kdcache").warning("log %s", {EVIL!r})
    warnings.warn("warning " + {EVIL!r})
    raise RuntimeError("a bug " + {EVIL!r})
kdcache.inspect.inspect_cache = inspect_cache
sys.argv = ["kdcache", "inspect", {places["CACHE"]!r}]
main()
"""
    err = subprocess.run([preloaded, "-c", code], capture_output=True, timeout=60).stderr.decode("utf-8")
    assert not UNSAFE.search(err), err
    for text in ("WARNING: log", "warning", "RuntimeError: a bug"):
        assert f"{text} \\x1b]0;PWN\\x07" in err


def test_one_module_writes_to_the_terminal():
    """print and click.echo would pass by the functions that make a value one line."""
    root = Path(kdcache.__file__).parent
    found = []
    for path in sorted(root.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in (
                *("print", "click.echo", "click.secho", "sys.stdout.write", "sys.stderr.write"),
            ):
                found.append(f"{path.relative_to(root)}:{node.lineno}")
    assert found == []
