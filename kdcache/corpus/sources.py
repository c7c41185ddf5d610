"""Resolve paths (file, directory, glob, hub data set) to an ordered list of sources with stable ids.

The id of a document starts with the path of its file relative to the common parent of all files, so moving a corpus or
reading only its beginning changes no id. Sources are in the order of the paths, and sorted inside a directory or glob.

A file counts once, however many names lead to it (links of either kind, loops of links). What a directory or a glob
holds and the corpus does not is counted, so that nothing is left out silently. The output of the command and other
caches are no texts.
"""

from __future__ import annotations

import fnmatch
import glob
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kdcache.corpus.csv_files import open_csv
from kdcache.corpus.file_bytes import COMPRESSIONS, FileBytes, Spool, decompressed
from kdcache.corpus.hub import open_hub
from kdcache.corpus.json_files import open_json
from kdcache.corpus.parquet_files import ParquetReader
from kdcache.corpus.readers import Reader
from kdcache.corpus.text_files import Split, TextFile
from kdcache.errors import CorpusError
from kdcache.words import count

HUB_PREFIX = "hf:"
#: Files that every cache begins with.
_OF_A_CACHE = ("plan.json", "plan.parquet")


@dataclass(frozen=True)
class Source:
    """One file (``path``) or hub data set (``name``, ``config``, ``split``); ``id`` begins its documents' ids."""

    id: str
    path: Path | None = None
    name: str = ""
    config: str | None = None
    split: str = "train"
    is_found: bool = False
    """Whether it was met in a directory, or by a pattern that names no kind of file."""

    def open(self, text_field: str, split_text: Split, spool: Spool) -> Reader:
        """Open the source; raises ``CorpusError`` if it cannot be read or has no such field.

        A compressed file is decompressed into ``spool``.
        """
        if self.path is None:
            return open_hub(self.name, self.config, self.split, text_field)
        try:
            extension, compression = _extension(self.path)
            if extension == _PARQUET:
                return ParquetReader(self.path, text_field)
            data = decompressed(self.path, compression, spool) if compression else FileBytes.of(self.path)
            return FORMATS[extension](data, text_field, split_text, spool)
        except OSError as error:
            raise CorpusError(f"cannot read {self.path}: {error.strerror or error}") from None

    @property
    def is_table(self) -> bool:
        """Whether the file may well be something else than texts, as a CSV file beside them often is."""
        return self.path is not None and _extension(self.path)[0] in (".csv", ".tsv")


@dataclass
class LeftOut:
    """What directories and patterns hold and the corpus does not, counted by kind."""

    counts: Counter[str] = field(default_factory=Counter)

    def add(self, kind: str) -> None:
        """Count one more of a kind, such as an extension."""
        self.counts[kind] += 1

    def __str__(self) -> str:
        return ", ".join(
            f"{number:,} {kind}" if kind.startswith((".", "without")) else count(number, kind)
            for kind, number in sorted(self.counts.items())
        )


def find_sources(paths: Sequence[str], outputs: Sequence[str | Path] = ()) -> tuple[list[Source], LeftOut]:
    """Return the sources that ``paths`` name, and what was left out of directories and patterns.

    ``outputs`` are local files and directories that are never part of the corpus. Raises ``CorpusError`` for a path
    that is missing, unsupported or inside one of them, and for files that are named twice.
    """
    found: list[Source | _File] = []
    left_out = LeftOut()
    search = _Search([os.path.realpath(output) for output in outputs], left_out)
    for path in paths:
        if path.startswith(HUB_PREFIX):
            found.append(_hub_source(path))
        else:
            found.extend(search.files(path))
    _check_no_repeats(found)
    files = [item.path for item in found if isinstance(item, _File)]
    parent = os.path.commonpath([path.parent for path in files]) if files else ""
    sources = [
        item
        if isinstance(item, Source)
        else Source(item.path.relative_to(parent).as_posix(), item.path, is_found=item.is_found)
        for item in found
    ]
    return sources, left_out


def supported() -> str:
    """Return what can be read, in words."""
    packed = ", ".join(COMPRESSIONS)
    return f"{', '.join(FORMATS)}, {_PARQUET}, and all but the last also with {packed} appended"


def _hub_source(path: str) -> Source:
    """Parse ``hf:NAME[:CONFIG][@SPLIT]``."""
    rest, _, split = path.removeprefix(HUB_PREFIX).partition("@")
    name, _, config = rest.partition(":")
    if not name:
        raise CorpusError(f"{path!r} names no data set; expected hf:NAME[:CONFIG][@SPLIT], e.g. hf:wikitext@train")
    split = split or "train"
    return Source(f"{HUB_PREFIX}{rest}@{split}", None, name, config or None, split)


@dataclass(frozen=True)
class _File:
    path: Path
    identity: tuple[int, int]
    """Of the file itself, whatever its name."""
    is_found: bool = False


class _Search:
    """Find files by names, directories and patterns; ``outputs`` are real paths."""

    def __init__(self, outputs: Sequence[str], left_out: LeftOut) -> None:
        self._outputs, self._left_out = outputs, left_out
        self._real_folders: dict[str, str] = {}

    def files(self, name: str) -> list[_File]:
        path = Path(os.path.abspath(os.path.expanduser(name)))
        if path.exists() and self._is_output(str(path)):
            raise CorpusError(f"{name} is (in) the output of this command, which is no corpus; choose another output")
        if path.is_dir():
            return self._usable(f"directory {name}", self._below(str(path)), is_found=True)
        if path.exists():
            return [_named(name, path)]
        if glob.has_magic(name):
            # A pattern that ends in .csv names tables; one that ends in * names whatever there is.
            return self._usable(f"pattern {name!r}", self._matching(str(path)), is_found=not _extension(path)[0])
        if os.path.lexists(path):
            raise CorpusError(f"{name} is a link to {os.path.realpath(path)}, which does not exist; correct the link")
        raise CorpusError(
            f"{name} does not exist (in {os.getcwd()}); a corpus is a file, a directory, a pattern such as "
            f"'data/*.jsonl' or a hub data set hf:NAME[:CONFIG][@SPLIT]"
        )

    def _is_output(self, name: str) -> bool:
        """Whether a file or directory is an output, or inside one."""
        if not self._outputs:
            return False
        folder, last = os.path.split(name)
        if folder not in self._real_folders:
            self._real_folders[folder] = os.path.realpath(folder)
        real = os.path.join(self._real_folders[folder], last)
        return any(real == output or real.startswith(output + os.sep) for output in self._outputs)

    def _usable(self, what: str, names: Iterable[str], *, is_found: bool = False) -> list[_File]:
        """Return the supported files among ``names``, sorted, and each once; count the others."""
        by_identity: dict[tuple[int, int], list[Path]] = {}
        for name in sorted(names):
            path = Path(name)
            try:
                found = path.stat()
            except OSError:
                self._left_out.add("broken link")
                continue
            if self._is_output(name):
                continue
            if stat.S_ISDIR(found.st_mode):
                self._left_out.add("folder")
            elif not stat.S_ISREG(found.st_mode):
                self._left_out.add("special file")
            elif not _extension(path)[0]:
                self._left_out.add(path.suffix.lower() or "without an extension")
            else:
                by_identity.setdefault((found.st_dev, found.st_ino), []).append(path)
        if not by_identity:
            others = f"; found {self._left_out}" if self._left_out.counts else ""
            raise CorpusError(f"{what} has no supported file; supported are {supported()}{others}")
        files = []
        for identity, paths in by_identity.items():
            for _ in paths[1:]:
                self._left_out.add("further name")
            # The name with the fewest links: a further link changes no id.
            files.append(_File(min(paths, key=_num_links) if paths[1:] else paths[0], identity, is_found))
        return sorted(files, key=lambda file: file.path.as_posix())

    def _matching(self, pattern: str) -> Iterable[str]:
        """Return the names that match a pattern, in which ``**`` stands for any number of folders."""
        parts = Path(pattern).parts
        if "**" not in parts:
            return glob.iglob(pattern)
        depth = next(n for n, part in enumerate(parts) if glob.has_magic(part))
        top = str(Path(*parts[:depth]))
        names = self._below(top, any(part.startswith(".") for part in parts[depth:]), is_counted=False)
        return (name for name in names if _matches(Path(name).parts[depth:], parts[depth:]))

    def _below(self, top: str, with_hidden: bool = False, *, is_counted: bool = True) -> Iterator[str]:
        """Yield all files below ``top``.

        Links to directories are followed, but every directory is entered once, so that loops end. Names that begin
        with a dot are hidden.
        """
        seen: set[tuple[int, int]] = set()
        folders, links = [top], list[str]()
        while folders or links:
            folder = folders.pop() if folders else links.pop(0)
            try:
                state = os.stat(folder)
                entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
            except OSError:
                self._left_out.add("unreadable folder")
                continue
            if (state.st_dev, state.st_ino) in seen or self._is_output(folder):
                continue
            seen.add((state.st_dev, state.st_ino))
            if folder != top and {entry.name for entry in entries}.issuperset(_OF_A_CACHE):
                self._left_out.add("kdcache cache")
                continue
            for entry in entries:
                if entry.name.startswith(".") and not with_hidden:
                    if is_counted:
                        self._left_out.add("hidden name")
                elif entry.is_dir():
                    (links if entry.is_symlink() else folders).append(entry.path)
                else:
                    yield entry.path


def _matches(names: Sequence[str], parts: Sequence[str]) -> bool:
    """Whether the parts of a path match those of a pattern; a hidden name must be matched by a dot."""
    if not names or not parts:
        return not names and not parts
    if parts[0] != "**":
        is_seen = not names[0].startswith(".") or parts[0].startswith(".")
        return is_seen and fnmatch.fnmatchcase(names[0], parts[0]) and _matches(names[1:], parts[1:])
    if len(parts) == 1:
        return not any(name.startswith(".") for name in names)
    return _matches(names, parts[1:]) or (not names[0].startswith(".") and _matches(names[1:], parts))


def _num_links(path: Path) -> int:
    return sum(os.path.islink(part) for part in (path, *path.parents))


def _named(name: str, path: Path) -> _File:
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise CorpusError(
            f"{name} is a pipe or a device, and a corpus is read more than once; write it to a file, and give the file"
        )
    if not _extension(path)[0]:
        raise CorpusError(f"{name}: unsupported kind of file; supported are {supported()}")
    return _File(path, (found.st_dev, found.st_ino))


def _check_no_repeats(found: Sequence[Source | _File]) -> None:
    seen: dict[object, str] = {}
    for item in found:
        name = item.id if isinstance(item, Source) else str(item.path)
        key = item if isinstance(item, Source) else item.identity
        if key in seen:
            also = "" if seen[key] == name else f", also as {seen[key]}"
            raise CorpusError(f"{name} is named twice by the paths of the corpus{also}; name every file once")
        seen[key] = name


def _extension(path: Path) -> tuple[str, str]:
    """Return the supported extension of ``path`` and that of its compression, both empty if there is none."""
    name = path.name.lower()
    compression = next((extension for extension in COMPRESSIONS if name.endswith(extension)), "")
    inner = name.removesuffix(compression)
    known = FORMATS if compression else (*FORMATS, _PARQUET)
    extension = next((extension for extension in known if inner.endswith(extension)), "")
    return (extension, compression) if extension else ("", "")


def _text(data: FileBytes, text_field: str, split_text: Split, spool: Spool) -> Reader:
    return TextFile(data, split_text)


def _json(data: FileBytes, text_field: str, split_text: Split, spool: Spool) -> Reader:
    return open_json(data, text_field, spool)


def _csv(data: FileBytes, text_field: str, split_text: Split, spool: Spool) -> Reader:
    return open_csv(data, text_field, ",")


def _tsv(data: FileBytes, text_field: str, split_text: Split, spool: Spool) -> Reader:
    return open_csv(data, text_field, "\t")


_PARQUET = ".parquet"
#: Every format that is read from bytes, by its extension; Parquet is read by pyarrow.
FORMATS: dict[str, Callable[[FileBytes, str, Split, Spool], Reader]] = {
    ".txt": _text,
    ".jsonl": _json,
    ".ndjson": _json,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _tsv,
}
