"""How tokens, rows and segments of a sequence hang together, by task: what docs/format.md says of each.

Tasks rely on it when they cut a sequence into what models are fed, so a cache that breaks it would give index errors,
or rows of one text with the answers of another. Sequences of tasks of other packages are taken as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.codecs.checks import check_rows

Arrays = Mapping[str, NDArray[Any]]


def check_sequences(task: str, arrays: Arrays) -> None:
    """Check the opened arrays of the tokens of a shard; raises ``CorruptCacheError`` naming array, row and value."""
    lengths_N = arrays["num_tokens"].astype(np.int64)
    if "token_index" in arrays:
        limits_P = np.repeat(lengths_N, arrays["num_positions"])
        index_P = arrays["token_index"]
        check_rows(index_P >= limits_P, index_P, "token_index", "is outside its sequence")
    if "segment_ids" in arrays:
        _check_ascending(arrays["segment_ids"], arrays["token_offsets"])
    count = _NUM_POSITIONS.get(task)
    if count is not None:
        expected_N, words = count(arrays, lengths_N)
        found_N = arrays["num_positions"]
        check_rows(found_N != expected_N, found_N, "num_positions", f"is not the number of {words}")


def _check_ascending(segments_T: NDArray[Any], offsets_N1: NDArray[np.int64]) -> None:
    wrong_T = np.zeros(len(segments_T), bool)
    wrong_T[1:] = segments_T[1:] < segments_T[:-1]
    wrong_T[offsets_N1[:-1]] = False  # another sequence begins
    check_rows(wrong_T, segments_T, "segment_ids", "is below that of the token before")


def _next_tokens(arrays: Arrays, lengths_N: NDArray[np.int64]) -> tuple[NDArray[np.int64], str]:
    return lengths_N - 1, "tokens that follow another one"


def _whole_text(arrays: Arrays, lengths_N: NDArray[np.int64]) -> tuple[NDArray[np.int64], str]:
    _check_at_most(arrays, 1)
    return np.ones_like(lengths_N), "texts or pairs of a sequence, 1"


def _target_tokens(arrays: Arrays, lengths_N: NDArray[np.int64]) -> tuple[NDArray[np.int64], str]:
    _check_at_most(arrays, 1)
    return _sums(arrays["segment_ids"] == 1, arrays), "tokens of the target"


def _texts(arrays: Arrays, lengths_N: NDArray[np.int64]) -> tuple[NDArray[np.int64], str]:
    _check_at_most(arrays, 1)
    return _num_groups(arrays["segment_ids"], arrays), "texts"


def _documents(arrays: Arrays, lengths_N: NDArray[np.int64]) -> tuple[NDArray[np.int64], str]:
    return _num_groups(arrays["segment_ids"] // 2, arrays), "documents"


def _check_at_most(arrays: Arrays, most: int) -> None:
    segments_T = arrays.get("segment_ids")
    if segments_T is not None:
        check_rows(segments_T > most, segments_T, "segment_ids", f"is above {most}, and there are two segments")


def _num_groups(groups_T: NDArray[Any], arrays: Arrays) -> NDArray[np.int64]:
    """Return how many groups of neighbours the tokens of every sequence form, [N]."""
    begins_T = np.ones(len(groups_T), bool)
    begins_T[1:] = groups_T[1:] != groups_T[:-1]
    begins_T[arrays["token_offsets"][:-1]] = True
    return _sums(begins_T, arrays)


def _sums(values_T: NDArray[np.bool_], arrays: Arrays) -> NDArray[np.int64]:
    return np.add.reduceat(values_T, arrays["token_offsets"][:-1], dtype=np.int64)


_Count = Callable[[Arrays, NDArray[np.int64]], tuple[NDArray[np.int64], str]]

#: By task: how many positions every sequence has, and what they are, in words.
_NUM_POSITIONS: dict[str, _Count] = {
    "causal-lm": _next_tokens,
    "sequence-classification": _whole_text,
    "sequence-regression": _whole_text,
    "seq2seq-lm": _target_tokens,
    "embedding": _texts,
    "ranking": _documents,
}
