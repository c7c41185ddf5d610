from __future__ import annotations

import numpy as np
import pytest
import torch

from kdcache.cache import open_cache
from kdcache.tasks import TASKS, causal_lm
from tests.synthetic import SyntheticCache

TOKENS = [np.array(values, np.uint32) for values in ([5, 6, 7], [8, 9], [1, 2, 3, 4, 5])]


def test_the_table_of_tasks():
    assert list(TASKS) == ["causal-lm"]


def test_row_l_predicts_token_l_plus_1():
    batch = causal_lm.pad_batch(TOKENS, pad_id=99)
    assert batch["input_ids"].tolist() == [[5, 6, 99, 99], [8, 99, 99, 99], [1, 2, 3, 4]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]]
    assert batch["labels"].tolist() == [6, 7, 9, 2, 3, 4, 5]
    assert batch["labels"].tolist() == causal_lm.labels(TOKENS).tolist()
    inputs = batch["input_ids"].reshape(-1)[batch["rows"]]
    assert inputs.tolist() == [5, 6, 8, 1, 2, 3, 4]
    assert {values.dtype for values in batch.values()} == {np.dtype(np.int64)}


def test_a_single_sequence_has_no_padding():
    batch = causal_lm.pad_batch(TOKENS[:1], pad_id=99)
    assert batch["input_ids"].tolist() == [[5, 6]]
    assert batch["rows"].tolist() == [0, 1]


def test_position_ids_restart_with_every_document_of_a_window():
    segments = [np.array(s, np.uint16) for s in ([0, 0, 1], [0, 0], [3, 4, 4, 4, 5])]
    batch = causal_lm.pad_batch(TOKENS, pad_id=99, segment_ids=segments)
    # Transformers keeps documents apart only where there is no mask.
    assert "attention_mask" not in batch
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3], [0, 1, 2, 3], [0, 0, 1, 2]]


def test_positions_after_a_border_in_padding_continue():
    batch = causal_lm.pad_batch(TOKENS[1:], 0, [np.array([0, 1], np.uint16), np.array([0, 0, 1, 1, 2], np.uint16)])
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3], [0, 1, 0, 1]]


@pytest.mark.parametrize("packed", [False, True])
def test_collate_lines_the_teachers_rows_up_with_the_labels(tmp_path, packed):
    source = SyntheticCache(packed=packed, hidden=("hidden-2",))
    source.write(tmp_path)
    indices = [12, 3, 3, 7]
    batch = causal_lm.collate(open_cache(str(tmp_path)).read(indices, hidden=["hidden-2"]), pad_id=0)
    assert ("position_ids" in batch) == packed
    np.testing.assert_array_equal(batch["labels"], np.concatenate([source.tokens[n][1:] for n in indices]))
    flat = batch["input_ids"].reshape(-1)[batch["rows"]]
    np.testing.assert_array_equal(flat, np.concatenate([source.tokens[n][:-1] for n in indices]))
    np.testing.assert_array_equal(batch["loss_mask"], np.concatenate([source.masks[n] for n in indices]).astype(bool))
    for name, key in (("ids_PK", "teacher_ids"), ("logprobs_PK", "teacher_logprobs"), ("entropy_P", "teacher_entropy")):
        expected = np.concatenate([getattr(source.targets[n], name) for n in indices])
        np.testing.assert_array_equal(batch[key], expected)
    np.testing.assert_array_equal(batch["hidden-2"], np.concatenate([source.states[n]["hidden-2"] for n in indices]))
    assert batch["teacher_ids"].dtype == np.int64
    assert all(torch.from_numpy(values) is not None for values in batch.values())
