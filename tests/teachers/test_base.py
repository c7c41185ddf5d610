"""What is asked of a teacher is compared with what it can give, before it runs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kdcache.cache.tail_prior import TailSum
from kdcache.config import build
from kdcache.dump import DumpConfig
from kdcache.errors import ConfigError, TeacherError
from kdcache.schema import SCALARS, TargetsRecord
from kdcache.teachers import BACKENDS, Answer, BackendConfig, Capabilities, Request, Teacher, TeacherConfig
from kdcache.teachers.base import add_tail_sums, top_k_targets
from kdcache.teachers.logits import require_logits
from tests.synthetic import random_targets, teacher_record

PLAIN = TargetsRecord(top_k=4, scalars=(), tail="remainder")


class Silent(Teacher):
    def __init__(self, **can: Any) -> None:
        self.capabilities = Capabilities(**can)
        self.record = teacher_record(50, name="quiet", backend="silent")

    def answer(self, sequences: Any, request: Request) -> Answer:
        raise AssertionError("it must not be asked")


#: What is asked, what lacks by default, what to set, and the capability that gives it.
REQUESTS: dict[str, tuple[Request, str, str, dict[str, Any]]] = {
    "ids": (
        Request(TargetsRecord(**{**dict(PLAIN), "top_k": 9})),
        "9 ids",
        "targets.top_k=4 or less",
        {"max_top_k": 9},
    ),
    "entropy": (
        Request(TargetsRecord(top_k=4, scalars=("entropy",), tail="remainder")),
        "the entropy",
        "targets.scalars=[]",
        {"scalars": ("entropy",)},
    ),
    "gold": (
        Request(TargetsRecord(top_k=4, scalars=("gold_logprob",), tail="remainder")),
        "the log-probability of the gold token",
        "targets.scalars=[]",
        {"scalars": ("gold_logprob",)},
    ),
    "tail": (
        Request(TargetsRecord(top_k=4, scalars=("log_tail",))),
        "the exact tail",
        "targets.tail=remainder",
        {"scalars": ("log_tail",)},
    ),
    "states": (Request(PLAIN, (1,)), "hidden states", "hidden_states.layers=[]", {"hidden_states": True}),
    "outputs": (Request(PLAIN, outputs=True), "raw outputs", "another task", {"outputs": True}),
    "packing": (Request(PLAIN, packed=True), "documents of a packed window", "packing=none", {"packing": True}),
    "samples": (
        Request(TargetsRecord(kind="sampled", top_k=0, num_samples=5)),
        "samples",
        "targets.kind=top-k",
        {"logits": True},
    ),
    "thresholds": (
        Request(TargetsRecord(**{**dict(PLAIN), "min_prob": 0.1})),
        "ids by min_prob or min_mass",
        "targets.min_prob=0",
        {"logits": True},
    ),
    "temperatures": (
        Request(TargetsRecord(**{**dict(PLAIN), "temperatures": (2.0,)})),
        "tails at other temperatures",
        "targets.temperatures=[]",
        {"logits": True},
    ),
    "prior": (
        Request(TargetsRecord(**{**dict(PLAIN), "tail_prior": True})),
        "the tail prior",
        "targets.tail_prior=false",
        {"logits": True},
    ),
    "LM head": (
        Request(TargetsRecord(kind="hidden", top_k=1), (2,)),
        "the last hidden state and LM head",
        "targets.kind=top-k",
        {"logits": True, "hidden_states": True, "lm_head": True},
    ),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_what_is_lacking_is_named_with_what_to_set(name):
    request, lacking, advice, gives = REQUESTS[name]
    with pytest.raises(TeacherError) as caught:
        Silent(max_top_k=4).check(request)
    message = str(caught.value)
    assert message.startswith("teacher backend 'silent' cannot give ")
    assert lacking in message
    assert advice in message
    assert "quiet" in message
    Silent(**{"max_top_k": 4, **gives}).check(request)


def test_everything_that_is_lacking_is_named_at_once():
    record = TargetsRecord(top_k=9, tail_prior=True)
    with pytest.raises(TeacherError) as caught:
        Silent(max_top_k=4).check(Request(record, (1,), packed=True))
    for words in ("9 ids", "tail prior", "exact tail", "gold token", "entropy", "hidden states", "packed window"):
        assert words in str(caught.value)


def test_the_most_probable_ids_alone_can_always_be_given():
    Silent().check(Request(PLAIN))
    Silent(logits=True, scalars=SCALARS).check(Request(TargetsRecord(top_k=9, tail_prior=True, temperatures=(2.0,))))


def test_logits_are_required_by_name():
    with pytest.raises(TeacherError, match=r"this needs the logits .* 'silent' does not give for quiet; use a backend"):
        require_logits(Silent(logits=True), "this")


def test_answers_of_batches_are_joined():
    targets = random_targets(7, TargetsRecord(kind="hybrid", top_k=2, num_samples=5), 40)
    vectors = np.random.default_rng(0).normal(size=(7, 3)).astype(np.float32)
    whole = Answer(targets, {"hidden-1": vectors})
    rows = (slice(0, 3), slice(3, 4), slice(4, 7))
    sums = [TailSum(np.full(4, n + 1.0), n) for n in range(3)]
    parts = [Answer(targets.take(r), {"hidden-1": vectors[r]}, s) for r, s in zip(rows, sums, strict=True)]
    joined = Answer.concatenate(parts)
    np.testing.assert_array_equal(joined.targets.ids_PK, whole.targets.ids_PK)
    np.testing.assert_array_equal(joined.vectors["hidden-1"], vectors)
    assert joined.tail_sum is not None
    assert (joined.tail_sum.sum_V.tolist(), joined.tail_sum.num_positions) == ([6.0] * 4, 3)
    assert Answer.concatenate(parts[:1]) is parts[0]
    assert add_tail_sums(iter([None, None])) is None


def test_targets_of_the_most_probable_ids():
    targets = top_k_targets([[3, 1], [0, 2]], np.log([[0.5, 0.25], [0.75, 0.25]]))
    np.testing.assert_allclose(np.exp(targets.log_tail_P), [0.25, 0], atol=1e-6)
    assert top_k_targets([[0]], [[0.0]]).log_tail_P[0] == -np.inf
    assert (targets.entropy_P, targets.gold_logprob_P) == (None, None)
    with pytest.raises(TeacherError, match="the log-probabilities of a position increase; the backend must sort them"):
        top_k_targets([[3, 1]], np.log([[0.25, 0.5]]))


# ---------------------------------------------------------------------------------------------- settings of backends


def configure(**teacher: Any) -> DumpConfig:
    return build(DumpConfig, {"output": "cache", "corpus": {"paths": ["a.txt"]}, "teacher": teacher})


def test_the_settings_are_those_of_the_backend():
    assert type(configure(model="a").teacher) is TeacherConfig
    assert configure(model="a", backend="transformers") == configure(model="a")
    assert configure(model="a", dtype="bf16").model_dump()["teacher"]["dtype"] == "bf16"
    with pytest.raises(ConfigError, match=r"'teacher\.model' is required"):
        configure(dtype="bf16")
    with pytest.raises(ConfigError, match=r"unknown setting 'teacher\.modle'; did you mean 'model'"):
        configure(modle="a")
    with pytest.raises(
        ConfigError, match=r"'teacher\.backend': unknown teacher backend 'transformer'; did you mean 'transformers'"
    ):
        configure(model="a", backend="transformer")
    with pytest.raises(ConfigError, match=r"'teacher'"):
        build(DumpConfig, {"output": "cache", "corpus": {"paths": ["a.txt"]}, "teacher": "a"})


def test_what_is_private_is_not_written_into_caches():
    class Served(BackendConfig):
        url: str
        private = ("url",)

    config = Served(backend="served", model="/home/somebody/model", url="http://user:key@host")
    assert config.public() == {"backend": "served", "model": "model"}


def test_every_backend_has_its_name_and_its_settings():
    for name in BACKENDS.own:
        assert BACKENDS[name].name == name
        assert issubclass(BACKENDS[name].config, BackendConfig)
        assert BACKENDS[name].config(model="a").backend == name
