"""Batches of a dump: their sizes, how many are under way, and what is said about wrong answers."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import numpy as np
import pytest

from kdcache.dump.answers import answers
from kdcache.errors import TeacherError
from kdcache.schema import Sequence, TargetsRecord
from kdcache.teachers import Answer, Capabilities, Request, Teacher
from kdcache.teachers.base import top_k_targets
from tests.synthetic import teacher_record

REQUEST = Request(TargetsRecord(top_k=2, scalars=(), tail="remainder"))


class Echo(Teacher):
    """Answers each position with its token, slowly; counts what is under way."""

    def __init__(self, **can) -> None:
        self.capabilities = Capabilities(**can)
        self.record = teacher_record(50)
        self.lock = threading.Lock()
        self.running = self.most = 0
        self.sizes: list[int] = []

    def answer(self, sequences, request):
        with self.lock:
            self.running += 1
            self.most = max(self.most, self.running)
            self.sizes.append(len(sequences))
        time.sleep(0.01)
        tokens = np.concatenate([s.tokens_T[:-1] for s in sequences]).astype(np.int32)
        with self.lock:
            self.running -= 1
        return Answer(top_k_targets(np.stack([tokens, tokens + 1], 1), np.full((len(tokens), 2), np.log(0.4))))


def sequences(*lengths: int) -> list[Sequence]:
    generator = np.random.default_rng(0)
    return [
        Sequence(n, generator.integers(0, 40, length + 1).astype(np.uint32), np.ones(length, np.uint8))
        for n, length in enumerate(lengths)
    ]


@pytest.mark.parametrize("concurrency", [1, 3])
def test_every_sequence_is_answered_once(concurrency):
    members, teacher = sequences(*range(1, 13)), Echo(concurrency=concurrency, max_batch_sequences=2)
    found = {}
    for batch, answer in answers(teacher, members, REQUEST, 1000):
        rows = np.split(answer.targets.ids_PK[:, 0], np.cumsum([s.num_positions for s in batch])[:-1])
        found |= {s.index: ids for s, ids in zip(batch, rows, strict=True)}
    assert sorted(found) == list(range(12))
    for sequence in members:
        np.testing.assert_array_equal(found[sequence.index], sequence.tokens_T[:-1])
    assert teacher.sizes == [2] * 6
    assert teacher.most <= concurrency
    if concurrency > 1:
        assert teacher.most > 1


def test_a_failure_of_one_of_several_batches_is_raised():
    class Broken(Echo):
        def answer(self, sequences, request):
            if sequences[0].index == 3:
                raise TeacherError("the server is gone")
            return super().answer(sequences, request)

    with pytest.raises(TeacherError, match="the server is gone"):
        list(answers(Broken(concurrency=4, max_batch_sequences=1), sequences(*[4] * 8), REQUEST, 100))


@pytest.mark.parametrize("wrong", ["positions", "ids", "entropy", "states"])
def test_an_answer_that_is_not_what_was_asked_is_named(wrong):
    class Wrong(Echo):
        def answer(self, sequences, request):
            answer = super().answer(sequences, request)
            if wrong == "positions":
                return replace(answer, targets=answer.targets.take(slice(0, -1)))
            if wrong == "ids":
                return replace(answer, targets=replace(answer.targets, ids_PK=answer.targets.ids_PK[:, :1]))
            return answer

    request = REQUEST
    if wrong == "entropy":
        request = Request(TargetsRecord(top_k=2, scalars=("entropy",), tail="remainder"))
    elif wrong == "states":
        request = replace(REQUEST, layers=(1,))
    words = {"positions": r"ids_PK of shape \(3, 2\) for a batch of 4 positions", "ids": r"ids_PK of shape \(4, 1\)"}
    expected = {**words, "entropy": "gave no entropy", "states": "gave no hidden-1"}[wrong]
    with pytest.raises(TeacherError, match=expected):
        list(answers(Wrong(), sequences(4), request, 100))
