"""How tokens, rows and segments of a sequence hang together: what breaks it is refused when a shard is opened."""

from __future__ import annotations

import numpy as np
import pytest

from kdcache.errors import CorruptCacheError
from kdcache.fields.rows import check_sequences
from tests.loops import loop


def arrays(tokens: list[int], positions: list[int], **more) -> dict[str, np.ndarray]:
    return {
        "num_tokens": np.array(tokens, np.uint32),
        "num_positions": np.array(positions, np.uint32),
        "token_offsets": np.concatenate([[0], np.cumsum(tokens)]),
        **{name: np.array(values, np.uint32) for name, values in more.items()},
    }


SOUND = [
    ("causal-lm", arrays([3, 2], [2, 1])),
    ("causal-lm", arrays([3, 2], [2, 1], segment_ids=[0, 1, 1, 0, 3])),
    ("masked-lm", arrays([3, 2], [2, 1], token_index=[0, 2, 1])),
    ("sequence-classification", arrays([3, 2], [1, 1], segment_ids=[0, 0, 1, 0, 0])),
    ("seq2seq-lm", arrays([3, 2], [2, 1], segment_ids=[0, 1, 1, 0, 1])),
    ("embedding", arrays([3, 2], [2, 1], segment_ids=[0, 1, 1, 0, 0])),
    ("ranking", arrays([3, 2], [2, 1], segment_ids=[0, 1, 2, 0, 1])),
    ("of another package", arrays([3, 2], [7, 1])),
]


def test_what_tasks_write():
    for task, values in SOUND:
        check_sequences(task, values)


@loop(
    ("task", "values", "words"),
    [
        ("causal-lm", arrays([3, 2], [1, 2]), "array num_positions, row 0: 1 is not the number of tokens that follow"),
        ("causal-lm", arrays([3, 2], [2, 1], segment_ids=[0, 1, 0, 0, 0]), "array segment_ids, row 2: 0 is below"),
        ("masked-lm", arrays([3, 2], [2, 1], token_index=[0, 3, 1]), "array token_index, row 1: 3 is outside"),
        ("sequence-regression", arrays([3], [2], segment_ids=[0, 0, 0]), "row 0: 2 is not the number of texts or"),
        ("sequence-classification", arrays([3], [1], segment_ids=[0, 0, 7]), "array segment_ids, row 2: 7 is above 1"),
        ("seq2seq-lm", arrays([3, 2], [2, 2], segment_ids=[0, 1, 1, 0, 1]), "row 1: 2 is not the number of tokens of"),
        ("embedding", arrays([3], [1], segment_ids=[0, 1, 1]), "row 0: 1 is not the number of texts"),
        ("ranking", arrays([3], [1], segment_ids=[0, 1, 2]), "row 0: 1 is not the number of documents"),
    ],
)
def test_what_no_task_writes(task, values, words):
    with pytest.raises(CorruptCacheError, match=words):
        check_sequences(task, values)
