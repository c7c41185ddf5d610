"""Data sets of the Hugging Face hub, downloaded, converted and memory-mapped by HF datasets."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyarrow as pa

from kdcache.corpus.readers import CLASS_NAMES, checked_columns, checked_texts, no_columns, values_of
from kdcache.corpus.record_file import no_text_field
from kdcache.errors import CorpusError


class HubReader:
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
        self._columns = dataset.select_columns(columns).with_format("arrow") if columns else None
        schema = dataset.features.arrow_schema if columns else pa.schema([])
        self.metadata_schema = pa.schema([_with_names(schema.field(c), dataset.features[c]) for c in columns])

    def texts(self, start: int, stop: int) -> list[str]:
        """Return the texts of rows ``start`` to ``stop``; null texts are empty."""
        return checked_texts(self.name, self._text_field, self._texts[start:stop][self._text_field], range(start, stop))

    def num_missing(self, stop: int) -> int:
        """Return how many of the first ``stop`` rows have null for a text, or no such field."""
        if self.num_rows == 0:
            return 0
        return int(self._texts.data.column(self._text_field).slice(0, stop).null_count)

    def metadata(self, rows: Sequence[int], names: Sequence[str]) -> pa.Table:
        """Return the columns ``names`` for ``rows``."""
        if not names or self._columns is None:
            return no_columns(len(rows))
        return checked_columns(self.name, self._columns[list(rows)].select(list(names)), rows)

    def values(self, rows: Sequence[int], names: Sequence[str]) -> list[list[Any]]:
        """Return the values of each of the columns ``names`` for ``rows``."""
        table = self.metadata(rows, names)
        return [values_of(table[name], self.metadata_schema.field(name)) for name in names]


def open_hub(name: str, config: str | None, split: str, text_field: str) -> HubReader:
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
    return HubReader(label, dataset, text_field)


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
        raise no_text_field(name, text_field, columns)
    if not _is_text(dataset, text_field):
        column = dataset.select_columns([text_field]).with_format("arrow")[:][text_field]
        import pyarrow.compute as pc

        row = max(pc.index(pc.is_valid(column), True).as_py(), 0)
        raise CorpusError(
            f"{name}, row {row}: field {text_field!r} must be a string, found {column.type}; choose with --text-field"
        )
