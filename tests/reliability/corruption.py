"""One file of a finished cache is damaged: bits flip, bytes are lost or inserted, files vanish or change places.

A case damages a copy of one cache, asks ``verify`` (in every fifth case ``verify --deep``), reads everything, and puts
the file back. Reading need not notice what changes no value, which is harmless; ``verify`` must notice every change.
"""

from __future__ import annotations

import logging
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kdcache.errors import KdcacheError
from kdcache.verify.stored import verify_cache
from tests.reliability.library import Library
from tests.reliability.outside import Surroundings
from tests.reliability.reading import read_everything
from tests.reliability.verdicts import Result, Verdict

#: Every so many cases verify decodes, too.
_DEEP_EVERY = 5


def _flip(data: bytes, generator: random.Random) -> bytes:
    changed = bytearray(data)
    bits = 1 << generator.randrange(8) if generator.random() < 0.7 else generator.randrange(1, 256)
    changed[generator.randrange(len(data))] ^= bits
    return bytes(changed)


def _cut(data: bytes, generator: random.Random) -> bytes:
    return data[: generator.randrange(len(data))]


def _cut_out(data: bytes, generator: random.Random) -> bytes:
    start = generator.randrange(len(data))
    return data[:start] + data[start + generator.randint(1, 64) :]


def _insert(data: bytes, generator: random.Random) -> bytes:
    place = generator.choice([0, len(data), generator.randrange(len(data))])
    return data[:place] + generator.randbytes(generator.randint(1, 50)) + data[place:]


def _blank(data: bytes, generator: random.Random) -> bytes:
    start = generator.randrange(len(data))
    size = min(512, len(data) - start)
    return data[:start] + bytes(size) + data[start + size :]


#: Damage to the bytes of one file, by name; with ``delete``, ``swap`` and ``replace`` below all that is done.
BYTES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "flip": _flip,
    "cut": _cut,
    "cut out": _cut_out,
    "insert": _insert,
    "blank": _blank,
}
#: How often each kind of damage is chosen, out of 100.
_SHARES = {"flip": 60, "cut": 10, "cut out": 4, "insert": 8, "blank": 5, "delete": 5, "swap": 4, "replace": 4}


@dataclass(frozen=True)
class _Damage:
    """What is done to a cache: new bytes (None: no file) by path, and the words for it."""

    words: str
    files: dict[Path, bytes | None]


class Corruption:
    """The engine of this module."""

    name = "corruption"
    limit_s = 60.0
    memory_bytes = 2 << 30
    handful = 50

    def __init__(self, library: Library, seed: int) -> None:
        self._seed = seed
        self._caches = {name: library.cache(name) for name in library.names}
        self._sound = {name: read_everything(path) for name, path in self._caches.items()}

    def prepare(self, work: Path) -> Callable[[int], Result]:
        """Return the function that runs a case in ``work``."""
        logging.disable(logging.CRITICAL)
        surroundings = Surroundings(work / "tree")
        surroundings.enter()
        copies: dict[str, Path] = {}

        def run(case: int) -> Result:
            generator = random.Random(f"{self._seed} {self.name} {case}")
            name = generator.choice(list(self._caches))
            if name not in copies:
                copies[name] = surroundings.inner / name
                shutil.copytree(self._caches[name], copies[name], ignore=shutil.ignore_patterns(".lock"))
                surroundings.allowed = list(copies.values())
                surroundings.changes()
            return self._run(case, name, copies[name], generator, surroundings)

        return run

    def _run(self, case: int, name: str, cache: Path, generator: random.Random, surroundings: Surroundings) -> Result:
        result = Result(case)
        damage = _choose(cache, generator)
        before = {path: path.read_bytes() for path in damage.files}
        for path, data in damage.files.items():
            path.unlink() if data is None else path.write_bytes(data)
        words = f"{name}, {damage.words}"
        deep = case % _DEEP_EVERY == 0
        self._verify(result, cache, words, deep=deep)
        self._read(result, name, cache, words)
        for path, data in before.items():
            path.write_bytes(data)
        if changed := surroundings.changes():
            result.add("read", Verdict.OUTSIDE, f"{words}: {changed}")
        return result

    def _verify(self, result: Result, cache: Path, words: str, *, deep: bool) -> None:
        step = "verify --deep" if deep else "verify"
        try:
            problems = verify_cache(str(cache), deep=deep, progress=False).problems
        except KdcacheError:
            result.add(step, Verdict.REFUSED)
        except MemoryError:
            result.add(step, Verdict.MEMORY, words)
        except Exception as error:
            result.add(step, Verdict.TRACEBACK, f"{words}: {described(error)}")
        else:
            result.add(step, Verdict.REFUSED if problems else Verdict.UNSEEN, words)

    def _read(self, result: Result, name: str, cache: Path, words: str) -> None:
        try:
            found = read_everything(cache)
        except KdcacheError:
            result.add("read", Verdict.REFUSED)
        except MemoryError:
            result.add("read", Verdict.MEMORY, words)
        except Exception as error:
            result.add("read", Verdict.TRACEBACK, f"{words}: {described(error)}")
        else:
            sound = self._sound[name]
            differ = sorted(key for key in sound.keys() | found.keys() if sound.get(key) != found.get(key))
            result.add("read", Verdict.SILENT if differ else Verdict.HARMLESS, f"{words}: {', '.join(differ)}")


def _choose(cache: Path, generator: random.Random) -> _Damage:
    """Choose damage that changes something."""
    files = sorted(path for path in cache.rglob("*") if path.is_file() and path.name != ".lock")
    sizes = [path.stat().st_size for path in files]
    while True:
        # By size half of the time, else most damage would be in small files, or in large ones.
        path = generator.choices(files, sizes)[0] if generator.random() < 0.5 else generator.choice(files)
        kind = generator.choices(list(_SHARES), list(_SHARES.values()))[0]
        data, words = path.read_bytes(), f"{kind} {path.relative_to(cache)}"
        if kind == "delete":
            return _Damage(words, {path: None})
        if kind in BYTES:
            changed = BYTES[kind](data, generator)
            if changed != data:
                return _Damage(f"{words} ({_place(data, changed)})", {path: changed})
            continue
        other = generator.choice([item for item in files if item.parent == path.parent])
        if (theirs := other.read_bytes()) != data:
            words += f" {'with' if kind == 'swap' else 'by'} {other.relative_to(cache)}"
            return _Damage(words, {path: theirs, other: data} if kind == "swap" else {path: theirs})


def _place(before: bytes, after: bytes) -> str:
    first = next(
        (n for n, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), min(len(before), len(after))
    )
    return f"from byte {first} of {len(before)}, then {len(after)}"


def described(error: Exception) -> str:
    """The error and the innermost place in kdcache that it passed."""
    place, trace = "", error.__traceback__
    while trace is not None:
        file = Path(trace.tb_frame.f_code.co_filename)
        if "kdcache" in file.parts and "tests" not in file.parts:
            place = f" at {file.parent.name}/{file.name}:{trace.tb_lineno}"
        trace = trace.tb_next
    return f"{type(error).__name__}: {str(error)[:150]}{place}"
