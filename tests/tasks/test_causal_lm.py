from __future__ import annotations

import numpy as np
import pytest
import torch

from kdcache.cache import open_cache
from kdcache.losses import TeacherRows
from kdcache.schema import Samples, SequenceBatch, Targets
from kdcache.tasks import TASKS
from tests import causal as causal_lm
from tests.synthetic import SyntheticCache

TOKENS = [np.array(values, np.uint32) for values in ([5, 6, 7], [8, 9], [1, 2, 3, 4, 5])]


def test_the_table_of_tasks():
    assert next(iter(TASKS)) == "causal-lm"
    assert all(task.name == name for name, task in TASKS.items())


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
    batch = causal_lm.collate(open_cache(str(tmp_path)).read(indices, fields=["hidden-2"]), pad_id=0)
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


def batch_of(targets: Targets, **hidden: np.ndarray) -> SequenceBatch:
    """Two sequences of 2 and 1 positions."""
    tokens_T = np.array([5, 6, 7, 8, 9], np.uint32)
    mask_P = np.ones(3, np.uint8)
    fields = {"targets": targets, **hidden}
    return SequenceBatch([0, 1], tokens_T, np.array([0, 3, 5]), np.array([0, 2, 3]), mask_P, fields)


def targets_of(probs_PK: list[list[float]], tail_P: list[float], **more: object) -> Targets:
    shape = (3, len(probs_PK[0]))
    with np.errstate(divide="ignore"):
        logprobs_PK, log_tail_P = np.log(np.reshape(probs_PK, shape)), np.log(tail_P)
    ids_PK = np.tile(np.arange(shape[1], dtype=np.int32), (3, 1))
    zeros_P = np.zeros(3, np.float32)
    return Targets(ids_PK, logprobs_PK.astype(np.float32), log_tail_P.astype(np.float32), zeros_P, zeros_P, **more)


def test_draws_stand_among_the_ids_of_a_batch():
    samples = Samples(np.array([[7, 8], [9, 0], [0, 0]], np.uint16), np.array([[3, 1], [4, 0], [0, 0]], np.uint8))
    targets = targets_of([[0.5, 0.3], [0.6, 0.2], [0.75, 0.25]], [0.2, 0.2, 0.0], samples=samples)
    batch = causal_lm.collate(batch_of(targets), pad_id=0)
    assert batch["teacher_ids"].tolist() == [[0, 1, 7, 8], [0, 1, 9, 0], [0, 1, 0, 0]]
    assert batch["teacher_ids"].dtype == np.int64
    np.testing.assert_allclose(
        np.exp(batch["teacher_logprobs"]), [[0.5, 0.3, 0.15, 0.05], [0.6, 0.2, 0.2, 0], [0.75, 0.25, 0, 0]], rtol=1e-6
    )
    assert batch["teacher_logprobs"].dtype == np.float32
    assert np.isneginf(batch["teacher_log_tail"]).all()


def test_sampled_targets_have_nothing_but_draws():
    samples = Samples(np.array([[7, 8], [9, 0], [3, 4]], np.int32), np.array([[3, 1], [4, 0], [2, 2]], np.int32))
    targets = targets_of([[], [], []], [1.0, 1.0, 1.0], samples=samples)
    batch = causal_lm.collate(batch_of(targets), pad_id=0)
    assert batch["teacher_ids"].tolist() == [[7, 8], [9, 9], [3, 4]]
    np.testing.assert_allclose(np.exp(batch["teacher_logprobs"]), [[0.75, 0.25], [1, 0], [0.5, 0.5]], rtol=1e-6)


def test_optional_parts_are_there_only_if_the_cache_has_them():
    probs = [[0.5, 0.3]] * 3
    plain = causal_lm.collate(batch_of(targets_of(probs, [0.2] * 3)), pad_id=0)
    assert not {"teacher_log_tails", "teacher_hidden"} & set(plain)
    log_tails_PG = np.full((3, 2), -0.5, np.float32)
    last_PD, other_PD = np.ones((3, 4), np.float32), np.zeros((3, 4), np.float32)
    source = batch_of(targets_of(probs, [0.2] * 3, log_tails_PG=log_tails_PG), last=last_PD, **{"hidden-2": other_PD})
    batch = causal_lm.collate(source, pad_id=0)
    assert batch["teacher_log_tails"] is log_tails_PG
    assert batch["teacher_hidden"] is last_PD
    assert batch["hidden-2"] is other_PD
    assert "last" not in batch
    assert set(source.hidden) == {"last", "hidden-2"}, "the batch itself is left as it was"
    rows = TeacherRows.from_batch({name: torch.from_numpy(values) for name, values in batch.items()})
    assert rows.log_tails_PG.shape == (3, 2)
    assert rows.select(torch.tensor([2])).hidden_PD.shape == (1, 4)
    assert TeacherRows.from_batch({name: torch.from_numpy(values) for name, values in plain.items()}).hidden_PD is None
