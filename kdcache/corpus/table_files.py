"""Tables of documents: JSON lines, Parquet and hub data sets, memory-mapped by HF datasets.

Every file becomes a data set of its own. So each row can be traced to its file, adding a file converts only that file,
and files may differ in their other columns. Converted files stay in the cache of HF datasets (``HF_DATASETS_CACHE``).
"""

from __future__ import annotations

import glob
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa

from kdcache.corpus.json_check import check_json, safe_batch_bytes
from kdcache.corpus.readers import CLASS_NAMES, no_columns
from kdcache.errors import CorpusError, did_you_mean


class TableReader:
    """Rows of an HF data set whose ``text_field`` is a string column.

    Raises ``CorpusError`` if there is no such column or it holds something else.
    """

    is_single = False

    def __init__(self, name: str, dataset: Any, text_field: str) -> None:
        self.name = name
        self.num_rows = len(dataset)
        if dataset.column_names:
            _check_text_column(name, dataset, text_field)
        columns = [column for column in dataset.column_names if column != text_field]
        self._texts = dataset.with_format("arrow")
        self._text_field = text_field
        self._metadata = dataset.select_columns(columns).with_format("arrow") if columns else None
        schema = dataset.features.arrow_schema if columns else pa.schema([])
        self.metadata_schema = pa.schema([_with_names(schema.field(c), dataset.features[c]) for c in columns])

    def texts(self, start: int, stop: int) -> list[str]:
        """Return the texts of rows ``start`` to ``stop``; null texts are empty."""
        column = self._texts[start:stop][self._text_field]
        try:
            return [text or "" for text in column.to_pylist()]
        except UnicodeDecodeError:
            row = start + next(row for row in range(len(column)) if not _is_valid(column[row : row + 1]))
            raise CorpusError(
                f"{self.name}, row {row}: field {self._text_field!r} is not UTF-8; convert it, e.g. with iconv -t utf-8"
            ) from None

    def num_missing(self, stop: int) -> int:
        """Return how many of the first ``stop`` rows have null for a text, or no such field."""
        if self.num_rows == 0:
            return 0
        return int(self._texts.data.column(self._text_field).slice(0, stop).null_count)

    def metadata(self, rows: Sequence[int]) -> pa.Table:
        """Return the columns other than the text for ``rows``."""
        if self._metadata is None:
            return no_columns(len(rows))
        table = self._metadata[list(rows)]
        for name in table.column_names:
            if not _is_valid(table[name]):
                raise CorpusError(f"{self.name}, rows {min(rows)} to {max(rows)}: field {name!r} is not UTF-8")
        return table


def open_json(path: Path, text_field: str) -> TableReader:
    """Open a JSON lines file (or one JSON array of objects)."""
    options: dict[str, Any] = {"chunksize": safe_batch_bytes(path, text_field)}
    # Left to itself the builder stores a field of mixed types as JSON text, quotes included: a text must never be.
    try:
        dataset = _load_file("json", path, **options, on_mixed_types=None)
    except Exception:
        if check_json(path, text_field) == 0:
            return _no_rows(path, text_field)
        dataset = _convert("json", path, **options)  # the texts are strings, so only other columns mix types
    if not _is_text(dataset, text_field) and text_field in dataset.column_names:
        check_json(path, text_field)
    return TableReader(str(path), dataset, text_field)


def open_parquet(path: Path, text_field: str) -> TableReader:
    """Open a Parquet file."""
    import pyarrow.parquet as pq

    try:
        if pq.read_metadata(path).num_rows == 0:  # which the library cannot convert
            return _no_rows(path, text_field)
    except pa.ArrowInvalid as error:
        raise CorpusError(f"cannot read {path} as parquet: {error}") from None
    return TableReader(str(path), _convert("parquet", path), text_field)


def open_hub(name: str, config: str | None, split: str, text_field: str) -> TableReader:
    """Open one split of a data set on the Hugging Face hub, downloading it if it is not cached yet."""
    label = f"hf:{name}{':' + config if config else ''}@{split}"
    import datasets

    try:
        with _quiet():
            # Versions below 4 would ask on standard input whether to run the script of a data set.
            dataset = datasets.load_dataset(name, config, split=split, trust_remote_code=False)
    except OSError as error:  # unknown names, refused access and all network failures
        raise CorpusError(
            f"cannot load {label} from the Hugging Face hub: {error}. Check the name and the network; "
            f"with HF_HUB_OFFLINE=1 only data sets that were downloaded before can be used"
        ) from error
    except Exception as error:  # unknown configuration or split, or a broken data set: the library says which
        raise CorpusError(f"cannot load {label} (hf:NAME[:CONFIG][@SPLIT]): {error}") from error
    return TableReader(label, dataset, text_field)


def _convert(builder: str, path: Path, **options: Any) -> Any:
    try:
        return _load_file(builder, path, **options)
    except Exception as error:
        reason = error.__cause__ or error
        raise CorpusError(f"cannot read {path} as {builder}: {reason}") from error


def _load_file(builder: str, path: Path, **options: Any) -> Any:
    import datasets

    with _quiet():
        # Data files are patterns to the library: a file called a[1].jsonl must not be read as one.
        return datasets.load_dataset(builder, data_files=[glob.escape(str(path))], split="train", **options)


def _no_rows(path: Path, text_field: str) -> TableReader:
    import datasets

    return TableReader(str(path), datasets.Dataset.from_dict({text_field: []}), text_field)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the library's progress bars and log lines off a terminal that has kdcache's own."""
    import datasets

    had_bars = not datasets.are_progress_bars_disabled()
    verbosity = datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        if had_bars:
            datasets.enable_progress_bars()


def _is_valid(column: pa.ChunkedArray) -> bool:
    """Whether all strings of ``column`` are UTF-8; Arrow files do not promise it."""
    try:
        column.validate(full=True)
    except pa.ArrowInvalid:
        return False
    return True


def _with_names(field: pa.Field, feature: Any) -> pa.Field:
    """Keep the names of a column of classes, or of lists of them, which its type does not tell."""
    names = getattr(getattr(feature, "feature", feature), "names", None)
    return field if names is None else field.with_metadata({CLASS_NAMES: json.dumps(names)})


def _is_text(dataset: Any, text_field: str) -> bool:
    feature = dataset.features.get(text_field)
    return getattr(feature, "dtype", None) in ("string", "large_string", "null") and type(feature).__name__ == "Value"


def _check_text_column(name: str, dataset: Any, text_field: str) -> None:
    columns = dataset.column_names
    if text_field not in columns:
        hint = did_you_mean(text_field, columns)
        listed = f" columns: {', '.join(columns)}" if hint.endswith("?") else ""
        raise CorpusError(f"{name} has no field {text_field!r}; {hint}{listed}; choose with --text-field")
    if not _is_text(dataset, text_field):
        column = dataset.select_columns([text_field]).with_format("arrow")[:][text_field]
        import pyarrow.compute as pc

        row = max(pc.index(pc.is_valid(column), True).as_py(), 0)
        raise CorpusError(
            f"{name}, row {row}: field {text_field!r} must be a string, found {column.type}; choose with --text-field"
        )
