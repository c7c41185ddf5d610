"""A corpus: documents in a fixed order with stable ids, from text files, JSON lines, Parquet or the Hugging Face hub.

Order and ids of the documents depend only on the names and contents of the files, so a dump can be resumed on another
machine. Equal fingerprints mean equal documents. Texts are read in batches of a bounded number of characters and are
not kept in memory; only a single document has to fit. `kdcache.corpus.readers` defines the interface of the formats.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field, field_validator

from kdcache.config import Config
from kdcache.corpus.column_types import as_text
from kdcache.corpus.file_bytes import Spool
from kdcache.corpus.readers import Reader, no_columns
from kdcache.corpus.record_file import NoTextFieldError
from kdcache.corpus.sources import find_sources, supported
from kdcache.corpus.text_files import Split
from kdcache.errors import CorpusError, did_you_mean
from kdcache.schema import Document
from kdcache.words import count

log = logging.getLogger(__name__)

_BATCH_DOCUMENTS = 256
#: Characters per batch: tokenising takes memory of a hundred times the text.
_BATCH_CHARACTERS = 4 << 20
#: Larger columns of the sequences of a shard, repeated values and all, are stored as dictionaries.
_MOST_REPEATED_BYTES = 256 << 20


@dataclass(frozen=True)
class Role:
    """A column that a task reads; it has the name of its role unless the configuration names another."""

    name: str
    is_required: bool = True


TEXT = Role("text")


class CorpusConfig(Config):
    """Which documents to read: ``paths`` are files, directories, patterns or ``hf:NAME[:CONFIG][@SPLIT]``."""

    paths: tuple[str, ...] = Field(min_length=1)
    text_field: str | None = None
    """Column of a table that holds the main text; by default the name of the task's first role, such as ``text``."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Columns that the task reads, by role, where their names differ from the roles: ``{label: sentiment}``."""
    split_text: Split = "file"
    """What one document of a .txt file is; paragraphs are separated by blank lines."""
    limit_documents: int | None = Field(default=None, ge=1)
    leave_out: tuple[str, ...] = ()
    """Columns that are not kept as metadata, such as raw pages beside their texts."""
    licence: str | None = None

    @field_validator("paths", mode="before")
    @classmethod
    def _one_path(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value


class Corpus:
    """Documents in order, with random access; made by `load_corpus`. It is used by one thread at a time.

    ``text_field`` is the column of the main text. ``more`` are the further columns that sequences are made of, by
    role; they are not metadata.
    """

    def __init__(
        self,
        config: CorpusConfig,
        readers: Sequence[tuple[str, Reader]],
        more: Mapping[str, str] | None = None,
        text_field: str = TEXT.name,
    ) -> None:
        self.config = config
        self.text_field = text_field
        self.more = dict(more or {})
        self._fingerprint: str | None = None
        self._ids = [source_id for source_id, _ in readers]
        self._readers = [reader for _, reader in readers]
        offsets = np.cumsum([0, *(reader.num_rows for reader in self._readers)])
        self._offsets = np.minimum(offsets, config.limit_documents or offsets[-1])
        every = _union([(reader.name, reader.metadata_schema) for reader in self._readers])
        left_out = {*self.more.values(), *config.leave_out}
        self._schema = pa.schema([field for field in every if field.name not in left_out])

    @property
    def sources(self) -> tuple[str, ...]:
        """The configured paths."""
        return self.config.paths

    @property
    def metadata_columns(self) -> tuple[str, ...]:
        """All columns that are no text, no role and not left out, over all files; a file that lacks one has nulls."""
        return tuple(self._schema.names)

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over id, text and further columns of every document, in order.

        The first complete pass of `iter_rows` computes it, so tokenising a corpus costs no second pass. Without one,
        this property reads the whole corpus.
        """
        if self._fingerprint is None:
            for _ in self.iter_rows(_BATCH_DOCUMENTS):
                pass
        assert self._fingerprint is not None
        return self._fingerprint

    def __len__(self) -> int:
        return int(self._offsets[-1])

    def __getitem__(self, index: int) -> Document:
        index = range(len(self))[index]
        return self._documents(index, self.texts(index, index + 1))[0]

    def __iter__(self) -> Iterator[Document]:
        for batch in self.iter_batches(_BATCH_DOCUMENTS):
            yield from batch

    def iter_batches(self, num_documents: int) -> Iterator[list[Document]]:
        """Yield all documents in lists of ``num_documents`` (the last may be shorter)."""
        for start, texts in self.iter_texts(num_documents):
            yield self._documents(start, texts)

    def iter_texts(self, num_documents: int) -> Iterator[tuple[int, list[str]]]:
        """Yield the index of the first document and the texts of each batch, without ids and metadata.

        A batch has at most ``num_documents`` texts of about four million characters together; a longer text comes
        alone.
        """
        start, batch, num_characters = 0, list[str](), 0
        for text in self._each_text(num_documents):
            is_full = len(batch) == num_documents or num_characters + len(text) > _BATCH_CHARACTERS
            if batch and is_full:
                yield start, batch
                start, batch, num_characters = start + len(batch), [], 0
            batch.append(text)
            num_characters += len(text)
        if batch:
            yield start, batch

    def iter_rows(self, num_documents: int) -> Iterator[tuple[int, list[tuple[str, dict[str, Any]]]]]:
        """Yield for each batch the index of its first document, and text and further columns of all its documents.

        Batches are those of `iter_texts`. The further columns are a dict by role; a value is None where a file lacks
        the column or has null. A complete pass also computes the `fingerprint`.
        """
        digest = hashlib.sha256() if self._fingerprint is None else None
        for start, texts in self.iter_texts(num_documents):
            more = self._more_rows(start, start + len(texts)) if self.more else [{} for _ in texts]
            rows = list(zip(texts, more, strict=True))
            if digest is not None:
                self._add(digest, start, rows)
            yield start, rows
        if digest is not None:
            self._fingerprint = digest.hexdigest()

    def _add(self, digest: hashlib._Hash, start: int, rows: list[tuple[str, dict[str, Any]]]) -> None:
        for document_id, (text, more) in zip(self.document_ids(range(start, start + len(rows))), rows, strict=True):
            further = [json.dumps(more, sort_keys=True, default=str).encode()] if more else []
            for data in (document_id.encode(), text.encode(), *further):
                # With the length in front, moving a character from the text to the id changes the digest.
                digest.update(len(data).to_bytes(8, "little") + data)

    def _more_rows(self, start: int, stop: int) -> list[dict[str, Any]]:
        """Return the further columns of documents ``start`` to ``stop`` by role, with the values of each file."""
        found: list[dict[str, Any]] = []
        for number, rows in self._locate(np.arange(start, stop)):
            reader = self._readers[number]
            held = set(reader.metadata_schema.names)
            names = [name for name in dict.fromkeys(self.more.values()) if name in held]
            with _reading(reader.name):
                values = dict(zip(names, reader.values(rows.tolist(), names) if names else [], strict=True))
            columns = [values.get(name) or [None] * len(rows) for name in self.more.values()]
            found += [dict(zip(self.more, row, strict=True)) for row in zip(*columns, strict=True)]
        return found

    def texts(self, start: int, stop: int) -> list[str]:
        """Return the texts of documents ``start`` to ``stop``."""
        return [text for texts in self._pieces(start, stop) for text in texts]

    def _each_text(self, num_rows: int) -> Iterator[str]:
        """Yield all texts, read from each source in steps of at most ``num_rows``."""
        for start in range(0, len(self), num_rows):
            for texts in self._pieces(start, min(start + num_rows, len(self))):
                yield from texts

    def _pieces(self, start: int, stop: int) -> Iterator[list[str]]:
        """Yield the texts of documents ``start`` to ``stop``, source by source."""
        for reader, rows in self._locate(np.arange(start, stop)):
            with _reading(self._readers[reader].name):
                texts = self._readers[reader].texts(int(rows[0]), int(rows[-1]) + 1)
            yield texts

    def document_ids(self, indices: Sequence[int] | NDArray[np.int64]) -> list[str]:
        """Return the ids of the documents at ``indices`` (any order, repeats allowed)."""
        documents = np.asarray(indices, np.int64)
        readers = np.searchsorted(self._offsets, documents, side="right") - 1
        rows = documents - self._offsets[readers]
        pairs = zip(readers.tolist(), rows.tolist(), strict=True)
        return [self._ids[r] if self._readers[r].is_single else f"{self._ids[r]}:{row}" for r, row in pairs]

    def metadata_table(self, indices: Sequence[int] | NDArray[np.int64]) -> pa.Table:
        """Return one row of `metadata_columns` for each document in ``indices`` (any order, repeats allowed)."""
        return self._columns(indices, self._schema)

    def _columns(self, indices: Sequence[int] | NDArray[np.int64], schema: pa.Schema) -> pa.Table:
        if not schema.names:
            return no_columns(len(indices))
        documents, inverse = np.unique(np.asarray(indices, np.int64), return_inverse=True)
        if not len(documents):
            return schema.empty_table()
        parts = [self._part(self._readers[reader], rows.tolist(), schema) for reader, rows in self._locate(documents)]
        return _repeated(pa.concat_tables(parts), inverse.reshape(-1).astype(np.int64))

    def _part(self, reader: Reader, rows: list[int], schema: pa.Schema) -> pa.Table:
        """Return rows of a source with exactly the columns of ``schema``: missing ones null, others converted."""
        held = set(reader.metadata_schema.names)
        with _reading(reader.name):
            table = reader.metadata(rows, [name for name in schema.names if name in held])
        return _conform(table, len(rows), schema)

    def _locate(self, documents: NDArray[np.int64]) -> Iterator[tuple[int, NDArray[np.int64]]]:
        """Yield each reader that holds some of the sorted ``documents``, with their rows in it."""
        cuts = np.searchsorted(documents, self._offsets)
        for reader in np.flatnonzero(np.diff(cuts)).tolist():
            yield reader, documents[cuts[reader] : cuts[reader + 1]] - self._offsets[reader]

    def _documents(self, start: int, texts: list[str]) -> list[Document]:
        indices = range(start, start + len(texts))
        ids = self.document_ids(indices)
        rows = self.metadata_table(indices).to_pylist() if self._schema.names else [{} for _ in texts]
        return [Document(*fields) for fields in zip(ids, texts, rows, strict=True)]


def load_corpus(config: CorpusConfig, roles: Sequence[Role] = (TEXT,), *, outputs: Sequence[str | Path] = ()) -> Corpus:
    """Find and open all sources of a corpus; ``roles`` are the columns that a task reads, the main text first.

    ``outputs`` are the local files and directories that the command writes, which are no part of the corpus. Raises
    ``CorpusError`` if a source is missing, unsupported, broken or without the text field, or if there are no documents.
    Sources beyond the first ``limit_documents`` documents are not opened. Rows with a null or missing text are
    documents without text. A warning counts them, and another what is left out of directories and patterns.
    """
    readers: list[tuple[str, Reader]] = []
    num_documents = 0
    text_field, more = _named(config, roles)
    spool = Spool()
    sources, left_out = find_sources(config.paths, outputs)
    for source in sources:
        try:
            reader = source.open(text_field, config.split_text, spool)
        except NoTextFieldError:
            if not (source.is_found and source.is_table):
                raise
            left_out.add(f".csv or .tsv without a column {text_field!r}")
            continue
        _check_columns(reader, text_field, {role.name: more[role.name] for role in roles[1:] if role.is_required})
        readers.append((source.id, reader))
        num_documents += reader.num_rows
        if config.limit_documents is not None and num_documents >= config.limit_documents:
            break
    if left_out.counts:
        log.warning("left out of %s: %s; supported are %s", ", ".join(config.paths), left_out, supported())
    if num_documents == 0:
        raise CorpusError(f"the corpus has no documents: {', '.join(config.paths)} hold no rows")
    _warn_of_missing_texts(config, text_field, [reader for _, reader in readers])
    held = {name for _, reader in readers for name in reader.metadata_schema.names}
    for role, name in more.items():
        if role in config.columns and name not in held:
            raise CorpusError(_no_column(", ".join(config.paths), role, name, [text_field, *sorted(held)]))
    strange = [name for name in config.leave_out if name not in held and name != text_field]
    if strange and config.limit_documents is None:
        raise CorpusError(
            f"leave_out: the corpus has no column {strange[0]!r}; {did_you_mean(strange[0], sorted(held))}"
        )
    return Corpus(config, readers, {role: name for role, name in more.items() if name in held}, text_field)


def _named(config: CorpusConfig, roles: Sequence[Role]) -> tuple[str, dict[str, str]]:
    """Return the column of the main text, and those of the other roles by role."""
    strange = sorted(set(config.columns) - {role.name for role in roles})
    if strange:
        known = [role.name for role in roles]
        hint = did_you_mean(strange[0], known)
        raise CorpusError(f"--column {strange[0]}=NAME: the task reads no {strange[0]!r}; {hint}")
    text, *more = roles
    text_field = config.columns.get(text.name) or config.text_field or text.name
    return text_field, {role.name: config.columns.get(role.name, role.name) for role in more}


def _check_columns(reader: Reader, text_field: str, required: Mapping[str, str]) -> None:
    names = reader.metadata_schema.names
    for role, name in required.items():
        if reader.num_rows and name not in names:
            raise CorpusError(_no_column(reader.name, role, name, [text_field, *names]))


def _no_column(where: str, role: str, name: str, columns: Sequence[str]) -> str:
    return (
        f"{where} has no column {name!r} for the {role} that the task reads; its columns are {', '.join(columns)}; "
        f"choose with --column {role}=NAME"
    )


def _warn_of_missing_texts(config: CorpusConfig, text_field: str, readers: Sequence[Reader]) -> None:
    left = config.limit_documents or sum(reader.num_rows for reader in readers)
    num_missing, first = 0, ""
    for reader in readers:
        missing = reader.num_missing(min(left, reader.num_rows))
        left -= min(left, reader.num_rows)
        first = first or (reader.name if missing else "")
        num_missing += missing
    if num_missing:
        log.warning(
            "%s no %r (null or missing) and %s counted as empty; the first is in %s",
            count(num_missing, "document") + (" has" if num_missing == 1 else " have"),
            text_field,
            "is" if num_missing == 1 else "are",
            first,
        )


@contextmanager
def _reading(name: str) -> Iterator[None]:
    """Name the source that cannot be read."""
    try:
        yield
    except OSError as error:
        raise CorpusError(f"cannot read {name}: {error.strerror or error}") from None


def _repeated(table: pa.Table, rows_N: NDArray[np.int64]) -> pa.Table:
    """Return ``rows_N`` of ``table``, with memory for each of its values once where they are large.

    A document of many sequences has its metadata in each of them: a raw page of 3 MB in a thousand sequences would take
    3 GB. Such columns become dictionaries, which hold every value once and an index per sequence.
    """
    if len(rows_N) == table.num_rows and np.array_equal(rows_N, np.arange(len(rows_N))):
        return table
    columns = []
    for name, column in zip(table.column_names, table.columns, strict=True):
        try:
            if _repeated_bytes(column, rows_N) > _MOST_REPEATED_BYTES:
                values = column.combine_chunks()
                columns.append(pa.DictionaryArray.from_arrays(pa.array(rows_N, pa.int32()), values))
            else:
                columns.append(column.take(pa.array(rows_N)))
        except pa.ArrowException as error:
            raise CorpusError(
                f"column {name!r} is too large to be kept with every sequence ({str(error)[:80]}); leave it out with "
                f"--leave-out {name}"
            ) from None
    return pa.table(columns, names=table.column_names)


def _repeated_bytes(column: pa.ChunkedArray, rows_N: NDArray[np.int64]) -> int:
    """Return the bytes of a column of strings or bytes when ``rows_N`` are taken; 0 for other types."""
    kind = column.type
    types = pa.types
    if not (types.is_string(kind) or types.is_large_string(kind) or types.is_binary(kind)):
        return 0
    import pyarrow.compute as pc

    lengths = pc.fill_null(pc.binary_length(column), 0).to_numpy()
    return int(lengths.astype(np.int64)[rows_N].sum())


def _union(schemas: Sequence[tuple[str, pa.Schema]]) -> pa.Schema:
    """Return all columns in order of appearance; types that do not go together become strings."""
    types: dict[str, pa.DataType] = {}
    for _, schema in schemas:
        for column in schema:
            types[column.name] = _common_type(types.get(column.name, pa.null()), column.type)
    return pa.schema(list(types.items()))


def _common_type(left: pa.DataType, right: pa.DataType) -> pa.DataType:
    try:
        pair = [pa.schema([("x", kind)]) for kind in (left, right)]
        return pa.unify_schemas(pair, promote_options="permissive").field("x").type
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return pa.string()


def _conform(table: pa.Table, num_rows: int, schema: pa.Schema) -> pa.Table:
    columns = []
    for column in schema:
        if column.name not in table.column_names:
            columns.append(pa.nulls(num_rows, column.type))
        else:
            columns.append(_to_type(table[column.name], column.type))
    return pa.table(columns, schema=schema)


def _to_type(values: pa.ChunkedArray, kind: pa.DataType) -> Any:
    if values.type.equals(kind):
        return values
    if kind == pa.string() and not pa.types.is_large_string(values.type):
        return pa.array([as_text(value) for value in values.to_pylist()], kind)
    return values.cast(kind)
