"""Resolve paths (file, directory, glob, hub data set) to an ordered list of sources with stable ids.

The id of a document starts with the path of its file relative to the common parent of all files, so moving a corpus or
reading only its beginning changes no id. Sources are in the order of the paths, and sorted inside a directory or glob.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from kdcache.corpus.readers import Reader
from kdcache.corpus.table_files import open_hub, open_json, open_parquet
from kdcache.corpus.text_files import Split, TextFile
from kdcache.errors import CorpusError

HUB_PREFIX = "hf:"


@dataclass(frozen=True)
class Source:
    """One file (``path``) or hub data set (``name``, ``config``, ``split``); ``id`` begins its documents' ids."""

    id: str
    path: Path | None = None
    name: str = ""
    config: str | None = None
    split: str = "train"

    def open(self, text_field: str, split_text: Split) -> Reader:
        """Open the source; raises ``CorpusError`` if it cannot be read or has no such field."""
        if self.path is None:
            return open_hub(self.name, self.config, self.split, text_field)
        try:
            return FORMATS[_extension(self.path)](self.path, text_field, split_text)
        except OSError as error:
            raise CorpusError(f"cannot read {self.path}: {error.strerror or error}") from None


def find_sources(paths: Sequence[str]) -> list[Source]:
    """Return the sources that ``paths`` name; raises ``CorpusError`` for one that is missing or unsupported."""
    found: list[Source | Path] = []
    for path in paths:
        if path.startswith(HUB_PREFIX):
            found.append(_hub_source(path))
        else:
            found.extend(_find_files(path))
    _check_no_repeats(found)
    files = [item for item in found if isinstance(item, Path)]
    parent = os.path.commonpath([item.parent for item in files]) if files else ""
    return [Source(item.relative_to(parent).as_posix(), item) if isinstance(item, Path) else item for item in found]


def _hub_source(path: str) -> Source:
    """Parse ``hf:NAME[:CONFIG][@SPLIT]``."""
    rest, _, split = path.removeprefix(HUB_PREFIX).partition("@")
    name, _, config = rest.partition(":")
    if not name:
        raise CorpusError(f"{path!r} names no data set; expected hf:NAME[:CONFIG][@SPLIT], e.g. hf:wikitext@train")
    split = split or "train"
    return Source(f"{HUB_PREFIX}{rest}@{split}", None, name, config or None, split)


def _find_files(name: str) -> list[Path]:
    path = Path(os.path.abspath(os.path.expanduser(name)))
    if path.is_file():
        if not _extension(path):
            raise CorpusError(f"{name}: unsupported kind of file; supported are {_supported()}")
        return [path]
    if path.is_dir():
        return _only_supported(f"directory {name}", glob.iglob(f"{glob.escape(str(path))}/**", recursive=True))
    if glob.has_magic(name):
        return _only_supported(f"pattern {name!r}", glob.iglob(str(path), recursive=True))
    raise CorpusError(
        f"{name} does not exist (in {os.getcwd()}); a corpus is a file, a directory, a pattern such as "
        f"'data/*.jsonl' or a hub data set hf:NAME[:CONFIG][@SPLIT]"
    )


def _only_supported(what: str, names: Iterable[str]) -> list[Path]:
    """Return the supported files among ``names``, sorted; hidden files and directories are not matched by glob."""
    files = [Path(name) for name in names if _extension(Path(name)) and os.path.isfile(name)]
    if not files:
        raise CorpusError(f"{what} has no supported file; supported are {_supported()}")
    return sorted(files, key=lambda file: file.as_posix())


def _check_no_repeats(found: Sequence[Source | Path]) -> None:
    seen = set()
    for item in found:
        if item in seen:
            name = item.id if isinstance(item, Source) else item
            raise CorpusError(f"{name} is named twice by the paths of the corpus; name every file once")
        seen.add(item)


def _extension(path: Path) -> str:
    """Return the supported extension of ``path``, empty if there is none."""
    name = path.name.lower()
    return next((extension for extension in FORMATS if name.endswith(extension)), "")


def _supported() -> str:
    return ", ".join(FORMATS)


def _text(path: Path, text_field: str, split_text: Split) -> Reader:
    return TextFile(path, split_text)


def _json(path: Path, text_field: str, split_text: Split) -> Reader:
    return open_json(path, text_field)


def _parquet(path: Path, text_field: str, split_text: Split) -> Reader:
    return open_parquet(path, text_field)


#: Every format by its extension.
FORMATS = {
    ".txt": _text,
    ".jsonl": _json,
    ".ndjson": _json,
    ".json": _json,
    ".parquet": _parquet,
}
