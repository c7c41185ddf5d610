"""A member of a manifest is nonsense, and everything else agrees with it, as in a cache that a stranger has made.

A case replaces one value of one manifest, at any depth, by a value that is too large, of another type, a path, a
control character, and so on, or leaves it out, or gives another name to a field, an attempt or a file wherever that
stands; then it brings plan and commit records into line. Seven commands read the cache. Each must do its work or refuse
with a `KdcacheError`.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
import math
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from kdcache import terminal
from kdcache.cache import layout
from kdcache.cli import cli
from kdcache.errors import KdcacheError
from tests.reliability.corruption import described
from tests.reliability.library import Library
from tests.reliability.outside import Surroundings
from tests.reliability.reading import read_everything
from tests.reliability.verdicts import Result, Verdict

#: A title, a colour, a right-to-left override, an end of text.
_CONTROLS = "\x1b]0;title\x07\x1b[31mred\x9b32m\u202eevil\x00"
#: What a terminal must not get; the sequences of tqdm's bars are not among these commands' output.
_RAW = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_MISSING = object()

#: Values of every type; names, paths and numbers that matter to something.
NONSENSE: list[Any] = [
    *(-1, 0, 1, 3, 2**31, 10**7, 10**13, 2**63, 10**30, 10**400),
    *(0.5, -0.0, 1e308, math.nan, math.inf, -math.inf),
    *("", " ", "x", "0", "é" * 300, _CONTROLS, "\ud800", "x" * 100_000),
    *("../../../up", "/", ".", "..", "a/../../../../up", "victim/keep.txt", "C:\\up", "nul\0", "tokens", "targets"),
    *(None, True, False, [], {}, [[]], [1], ["a"], {"a": 1}, [None], [-1, 10**13]),
    *(_MISSING, _MISSING, [[[[[[[[]]]]]]]], {"name": "exact"}, {"kind": "hidden"}),
]

#: What the name of a field, an attempt or a file becomes, everywhere; the second argument of format is the root.
NAMES = (
    *("{0}/../../../../victim", "../{0}", "../../../../up", "{0}/x", "{1}/victim/keep.txt", "/", ".", "..", "", " "),
    *(
        "{0}/../{0}",
        "a\\b",
        "{0}\0",
        "x" * 300,
        "é" * 130,
        _CONTROLS,
        "\ud800",
        "nul",
        "commits",
        "manifest.json",
        "C:up",
    ),
)
#: The share of cases in which a name is replaced everywhere, not one value.
_RENAMED = 0.25

Path_ = tuple[str | int, ...]


def leaves(value: Any, path: Path_ = ()) -> Iterator[Path_]:
    """Yield the path of every value in ``value``; of lists only the first two items, which are like the others."""
    yield path
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, (*path, key))
    elif isinstance(value, list):
        for number, item in enumerate(value[:2]):
            yield from leaves(item, (*path, number))


def replaced(manifest: Any, path: Path_, value: Any) -> Any:
    """Return a copy of ``manifest`` with ``value`` at ``path``."""
    if not path:
        return None if value is _MISSING else value
    changed = copy.deepcopy(manifest)
    parent = changed
    for key in path[:-1]:
        parent = parent[key]
    if value is not _MISSING:
        parent[path[-1]] = copy.deepcopy(value)
    elif isinstance(parent, dict):
        del parent[path[-1]]
    else:
        parent.pop(path[-1])
    return changed


def names_in(manifest: Any) -> list[str]:
    """Return the names in ``manifest`` that paths of files are made of: of fields, attempts and files."""
    fields = [field["name"] for field in manifest["fields"]]
    attempts = [shard["attempt"] for shard in manifest["shards"]]
    files = [Path(record["path"]).name for record in (*manifest["tokenizer_files"], *manifest["cache_files"])]
    return sorted({*fields, *attempts, *files})


def renamed(value: Any, old: str, new: str) -> Any:
    """Return ``value`` with the name ``old`` replaced wherever it stands: as a key, as a value, as a part of a path."""
    if isinstance(value, dict):
        return {_rename(key, old, new): renamed(item, old, new) for key, item in value.items()}
    if isinstance(value, list):
        return [renamed(item, old, new) for item in value]
    return _rename(value, old, new) if isinstance(value, str) else value


def _rename(text: str, old: str, new: str) -> str:
    if text == old:
        return new
    parts = [new if part == old else part.replace(f"-{old}.", f"-{new}.") for part in text.split("/")]
    return "/".join(parts) if "/" in text else text


def move_files(cache: Path, old: str, new: str, within: Path) -> None:
    """Put the files whose paths hold the name ``old`` where ``new`` leads, where that can be and is ``within``."""
    for path in sorted(path for path in cache.rglob("*") if path.is_file()):
        name = path.relative_to(cache).as_posix()
        target = Path(os.path.normpath(f"{cache}/{_rename(name, old, new)}"))
        if target == path or within not in target.parents:
            continue
        with contextlib.suppress(OSError, ValueError):  # no name of a file
            if not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)


def write_consistently(cache: Path, manifest: Any, *, everywhere: bool) -> None:
    """Write ``manifest``; with ``everywhere`` also the plan and the commit records that belong to it."""
    (cache / layout.MANIFEST).write_bytes(_json(manifest))
    if not everywhere or not isinstance(manifest, dict):
        return
    own = ("shards", "tokenizer_files", "cache_files")
    (cache / layout.PLAN).write_bytes(_json({name: value for name, value in manifest.items() if name not in own}))
    shards = manifest.get("shards")
    for number, shard in enumerate(shards if isinstance(shards, list) else []):
        (cache / layout.commit_name(number)).write_bytes(_json(shard))


def _json(values: Any) -> bytes:
    # As kdcache writes it, but NaN, infinity and lone surrogates pass.
    return (json.dumps(values, indent=1, sort_keys=True) + "\n").encode()


class Manifests:
    """The engine of this module."""

    name = "manifests"
    limit_s = 90.0
    memory_bytes = 2 << 30
    handful = 5

    def __init__(self, library: Library, seed: int) -> None:
        self._seed = seed
        self._caches = {name: library.cache(name) for name in library.names}
        self._manifests = {
            name: json.loads((path / layout.MANIFEST).read_text()) for name, path in self._caches.items()
        }
        for manifest in self._manifests.values():
            manifest.pop(layout.CHECKSUM, None)  # which whoever changes a manifest on purpose leaves out, or makes anew
        self._leaves = self._all_leaves()

    def _all_leaves(self) -> list[tuple[str, Path_]]:
        """Every kind of member once (list items count as one), of a cache that has it, in an order by the seed."""
        found: dict[tuple[Any, ...], list[tuple[str, Path_]]] = {}
        for name, manifest in self._manifests.items():
            for path in leaves(manifest):
                kind = tuple("*" if isinstance(key, int) else key for key in path)
                found.setdefault(kind, []).append((name, path))
        generator = random.Random(f"{self._seed} leaves")
        chosen = [generator.choice(places) for places in found.values()]
        generator.shuffle(chosen)
        return chosen

    def prepare(self, work: Path) -> Callable[[int], Result]:
        """Return the function that runs a case in ``work``."""
        surroundings = Surroundings(work / "tree")
        surroundings.enter()
        cache, outputs = (
            surroundings.inner / "cache",
            [surroundings.inner / name for name in ("pulled", "part", "made")],
        )
        surroundings.allowed = [cache, *outputs]
        return lambda case: self._run(case, cache, outputs, surroundings)

    def _run(self, case: int, cache: Path, outputs: Sequence[Path], surroundings: Surroundings) -> Result:
        generator = random.Random(f"{self._seed} {self.name} {case}")
        name, path = self._leaves[case % len(self._leaves)]
        # In each round over the members every one gets a value that it has not had.
        values = [*NONSENSE, str(surroundings.root / "victim" / "keep.txt")]
        random.Random(f"{self._seed} {path}").shuffle(values)
        value = values[(case // len(self._leaves)) % len(values)]
        everywhere = generator.random() < 0.8
        for directory in (cache, *outputs):
            shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(self._caches[name], cache, ignore=shutil.ignore_patterns(".lock"))
        if generator.random() < _RENAMED:
            old = generator.choice(names_in(self._manifests[name]))
            new = generator.choice(NAMES).format(old, surroundings.root)
            changed, words = renamed(self._manifests[name], old, new), f"{old!r} is named {new[:60]!r}"
            move_files(cache, old, new, surroundings.root)
        else:
            changed = replaced(self._manifests[name], path, value)
            words = f"{'.'.join(map(str, path))} = {'missing' if value is _MISSING else repr(value)[:60]}"
        write_consistently(cache, changed, everywhere=everywhere)
        surroundings.changes()
        return self._commands(Result(case), f"{name}, {words}", cache, outputs, surroundings)

    def _commands(
        self, result: Result, words: str, cache: Path, outputs: Sequence[Path], surroundings: Surroundings
    ) -> Result:
        pulled, part, made = map(str, outputs)
        commands = {
            "inspect": ["inspect", str(cache)],
            "verify --deep": ["verify", str(cache), "--deep", "--quiet"],
            "peek": ["peek", str(cache)],
            "pull": ["pull", str(cache), pulled, "--quiet"],
            "pull --shards": ["pull", str(cache), part, "--shards", "0", "--quiet"],
            "transcode": ["transcode", str(cache), made, "--quiet"],
        }
        for step, arguments in commands.items():
            _judge(result, step, words, lambda arguments=arguments: _command(arguments), surroundings)
        _judge(result, "read", words, lambda: str(read_everything(cache))[:0], surroundings)
        return result


def _judge(result: Result, step: str, words: str, use: Callable[[], str], surroundings: Surroundings) -> None:
    """Count how ``use`` ends; it returns what it wrote."""
    output = ""
    try:
        output = use()
    except KdcacheError as error:
        result.add(step, Verdict.REFUSED)
        output = terminal.printable(str(error))  # as the command line writes it
    except MemoryError:
        result.add(step, Verdict.MEMORY, words)
    except Exception as error:
        result.add(step, Verdict.TRACEBACK, f"{words}: {described(error)}")
    else:
        result.add(step, Verdict.WORKED)
    if raw := _RAW.search(output):
        result.add(
            step, Verdict.TERMINAL, f"{words}: {raw[0]!r} in {output[max(raw.start() - 30, 0) : raw.end() + 30]!r}"
        )
    if changed := surroundings.changes():
        result.add(step, Verdict.OUTSIDE, f"{words}: {changed}")


def _command(arguments: Sequence[str]) -> str:
    """Run a command as the command line does, and return what it wrote; raises what it would print as an error."""
    logging.getLogger().handlers.clear()  # they would write to the streams of an earlier command
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output), terminal.guarded():
        logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
        try:
            cli.main(list(arguments), prog_name="kdcache", standalone_mode=False)
        except SystemExit as stop:
            if stop.code == 1:  # such as `verify` that lists what is wrong
                raise KdcacheError(output.getvalue()) from None
            if stop.code not in (0, None):
                raise RuntimeError(f"exit code {stop.code}") from None
    return output.getvalue()
