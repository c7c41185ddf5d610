"""Dumps of every kind of targets, by a teacher whose answers are known."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from kdcache.cache import Cache, open_cache
from kdcache.codecs import TOPK_CODECS
from kdcache.errors import CacheError
from kdcache.models.lm_head import head_from_bytes
from kdcache.schema import SequenceBatch
from kdcache.teachers.samples import sample_uniforms
from kdcache.verify.stored import verify_cache
from tests.cache.test_writer import content_of, snapshot
from tests.contracts.matching import as_counts, check_merged
from tests.dump.fake import VOCAB_SIZE, BigramTeacher, LinearTeacher, run_dump
from tests.dump.test_dump import check_targets

KINDS = {
    "default": {},
    "min_prob": {"top_k": 20, "min_prob": 0.01},
    "min_mass": {"top_k": 20, "min_mass": 0.6},
    "both": {"top_k": 20, "min_prob": 0.01, "min_mass": 0.6, "temperatures": [0.5, 3.0]},
    "temperatures": {"top_k": 5, "temperatures": [2.0, 4.0]},
    "all ids": {"top_k": VOCAB_SIZE, "temperatures": [2.0]},
    "sampled": {"kind": "sampled", "num_samples": 25},
    "sampled, 400 samples": {"kind": "sampled", "num_samples": 400, "seed": 9},
    "hybrid": {"kind": "hybrid", "top_k": 4, "num_samples": 25},
    "hidden": {"kind": "hidden"},
}
kinds = pytest.mark.parametrize("kind", KINDS)


def dump_kind(corpus, output, kind, *, codec="exact", teacher=None, **settings) -> LinearTeacher:
    teacher = teacher or LinearTeacher()
    layers = (1,) if kind == "hidden" else ()
    run_dump(corpus, output, teacher, layers=layers, targets={**KINDS[kind], "codec": codec}, **settings)
    return teacher


@pytest.fixture(scope="module")
def exact(tmp_path_factory, corpus_file) -> Callable[[str], Path]:
    """Return the dump of a kind in the exact codec, made once and only read."""

    @functools.cache
    def made(kind: str) -> Path:
        path = tmp_path_factory.mktemp("exact")
        dump_kind(corpus_file, path, kind)
        return path

    return made


def probabilities(teacher: BigramTeacher, batch: SequenceBatch) -> np.ndarray:
    """The teacher's distribution at every row, float64."""
    pieces = np.split(batch.tokens_T, batch.token_offsets_N1[1:-1])
    logits = teacher.logits_VV.double()[np.concatenate([piece[:-1] for piece in pieces]).astype(int)]
    return logits.softmax(1).numpy()


def outside(probs_PV: np.ndarray, batch: SequenceBatch) -> np.ndarray:
    """The same with the kept ids at 0."""
    tail_PV = probs_PV.copy()
    np.put_along_axis(tail_PV, batch.targets.ids_PK.astype(np.int64), 0, axis=1)
    return tail_PV


def whole(path) -> tuple[Cache, SequenceBatch]:
    cache = open_cache(str(path))
    return cache, cache.read(range(len(cache)))


@kinds
def test_every_row_is_what_the_teacher_says(exact, kind):
    cache, _ = check_targets(exact(kind), LinearTeacher())
    check_merged(cache.read(range(len(cache))).targets)
    assert verify_cache(str(exact(kind)), deep=True).problems == []


@kinds
@pytest.mark.parametrize("codec", [name for name in TOPK_CODECS if name != "exact"])
def test_every_kind_in_every_codec(tmp_path, corpus_file, kind, codec):
    dump_kind(corpus_file, tmp_path, kind, codec=codec, hidden_states={"codec": "int8"})
    assert verify_cache(str(tmp_path), deep=True).problems == []
    _, batch = whole(tmp_path)
    check_merged(batch.targets)


@kinds
@pytest.mark.parametrize("batch_tokens", [1, 50, 10_000])
def test_the_batch_size_changes_nothing(tmp_path, corpus_file, exact, kind, batch_tokens):
    dump_kind(corpus_file, tmp_path, kind, batch_tokens=batch_tokens)
    assert content_of(exact(kind)) == content_of(tmp_path)
    priors = [open_cache(str(path)).tail_prior_V for path in (exact(kind), tmp_path)]
    assert (priors[0] is None) is (priors[1] is None)
    if priors[0] is not None:  # a sum over batches, so its last bits may differ
        np.testing.assert_allclose(priors[0], priors[1], rtol=1e-5, atol=1e-9)


def test_draws_do_not_depend_on_halved_batches_either(tmp_path, corpus_file):
    dump_kind(corpus_file, tmp_path / "a", "hybrid")
    teacher = LinearTeacher(max_tokens=40)
    dump_kind(corpus_file, tmp_path / "b", "hybrid", teacher=teacher, batch_tokens=1000)
    assert teacher.num_refused > 0
    assert content_of(tmp_path / "a") == content_of(tmp_path / "b")


@pytest.mark.parametrize("kind", ["sampled", "sampled, 400 samples", "hybrid"])
def test_draws_are_those_of_the_uniform_numbers(exact, kind):
    teacher = LinearTeacher()
    cache, batch = whole(exact(kind))
    record = cache.manifest.targets
    lengths = np.diff(batch.position_offsets_N1)
    uniforms = sample_uniforms(record.seed, list(range(len(cache))), lengths, record.num_samples)
    tail_PV = outside(probabilities(teacher, batch), batch)
    ends_PV = tail_PV.cumsum(axis=1) / tail_PV.sum(axis=1, keepdims=True)
    different = 0
    for row, found in enumerate(as_counts(batch.targets.samples)):
        ids = np.searchsorted(ends_PV[row], uniforms[row], side="right")
        expected = dict(zip(*(part.tolist() for part in np.unique(ids, return_counts=True)), strict=True))
        assert sum(found.values()) == record.num_samples
        assert all(tail_PV[row, token_id] > 0 for token_id in found)
        different += sum(abs(found.get(i, 0) - expected.get(i, 0)) for i in {*found, *expected}) // 2
    # A number that falls on the edge of two ids may go to either: the teacher's sums are float32.
    assert different <= 1e-4 * uniforms.size


def test_another_seed_draws_others(tmp_path, corpus_file):
    for seed in (0, 1):
        targets = {**KINDS["sampled"], "seed": seed}
        run_dump(corpus_file, tmp_path / str(seed), BigramTeacher(), targets=targets)
    first, second = (as_counts(whole(tmp_path / str(seed))[1].targets.samples) for seed in (0, 1))
    assert sum(a != b for a, b in zip(first, second, strict=True)) > 0.9 * len(first)


def test_the_tail_prior_is_the_mean_of_what_is_not_kept(exact):
    teacher = LinearTeacher()
    for kind in ("default", "min_prob", "temperatures"):
        cache, batch = whole(exact(kind))
        expected = outside(probabilities(teacher, batch), batch).mean(axis=0)
        np.testing.assert_allclose(cache.tail_prior_V, expected, rtol=1e-4, atol=1e-9)
        assert cache.tail_prior_V.sum() == pytest.approx(np.exp(batch.targets.log_tail_P).mean(), rel=1e-4)


def test_the_last_state_and_the_head_say_everything_again(exact):
    teacher = LinearTeacher()
    cache, batch = whole(exact("hidden"))
    assert cache.manifest.hidden_layers == ("hidden-1",)
    head = head_from_bytes(cache.lm_head_file())
    logprobs_PV = head.logits(torch.from_numpy(batch.hidden["last"])).log_softmax(1).numpy()
    expected = np.log(probabilities(teacher, batch))
    np.testing.assert_allclose(logprobs_PV, expected, atol=1e-5)
    labels = np.concatenate([piece[1:] for piece in np.split(batch.tokens_T, batch.token_offsets_N1[1:-1])]).astype(int)
    gold = logprobs_PV[np.arange(len(labels)), labels]
    np.testing.assert_allclose(batch.targets.gold_logprob_P, gold, atol=1e-4)


def test_packed_windows_of_draws(tmp_path, corpus_file):
    teacher = dump_kind(corpus_file, tmp_path, "hybrid", sequences={"max_length": 32, "packing": "window"})
    check_targets(tmp_path, teacher)
    assert verify_cache(str(tmp_path), deep=True).problems == []


def test_an_id_that_the_teacher_rules_out_is_never_drawn(tmp_path, corpus_file):
    teacher = BigramTeacher()
    teacher.logits_VV[:, 100:] = -torch.inf
    run_dump(corpus_file, tmp_path, teacher, targets={"kind": "sampled", "num_samples": 200})
    assert max(max(row) for row in as_counts(whole(tmp_path)[1].targets.samples)) < 100


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_states": {"codec": "int8"}}, "fields.hidden-1.codec.name is 'exact' there and 'int8' here"),
        ({"layers": (0, 1)}, "fields.hidden-0 is None there and {'kind'"),
        (
            {"targets": {"kind": "hidden", "codec": "fp16"}},
            "fields.targets.codec.name is 'exact' there and 'fp16' here",
        ),
    ],
    ids=str,
)
def test_other_codecs_or_layers_are_named(tmp_path, corpus_file, changes, words):
    settings = {"layers": (1,), "targets": {"kind": "hidden", "codec": "exact"}}
    run_dump(corpus_file, tmp_path, LinearTeacher(), **settings)
    with pytest.raises(CacheError, match=f"holds another cache: .*{words}"):
        run_dump(corpus_file, tmp_path, LinearTeacher(), **{**settings, **changes})


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        ("sampled", {"kind": "sampled", "num_samples": 24}, "targets.num_samples is 25 there and 24 here"),
        ("sampled", {"kind": "sampled", "num_samples": 25, "seed": 1}, "targets.seed is 0 there and 1 here"),
        ("hybrid", {"kind": "sampled", "num_samples": 25}, "targets.kind is 'hybrid' there and 'sampled' here"),
        ("min_prob", {"top_k": 20, "min_prob": 0.02}, "targets.min_prob is 0.01 there and 0.02 here"),
        ("default", {"top_k": 64, "tail_prior": False}, "targets.tail_prior is True there and False here"),
        ("temperatures", {"top_k": 5, "temperatures": [2.0, 3.0]}, "targets.temperatures"),
    ],
    ids=str,
)
def test_other_targets_on_the_same_output(tmp_path, corpus_file, first, second, words):
    dump_kind(corpus_file, tmp_path, first)
    before = snapshot(tmp_path)
    with pytest.raises(CacheError, match=f"holds another cache: .*{words}"):
        run_dump(corpus_file, tmp_path, LinearTeacher(), targets={**second, "codec": "exact"})
    assert snapshot(tmp_path) == before


def test_running_again_writes_nothing(tmp_path, corpus_file):
    for kind in ("default", "hidden"):
        dump_kind(corpus_file, tmp_path / kind, kind)
        before = snapshot(tmp_path / kind)
        dump_kind(corpus_file, tmp_path / kind, kind)
        assert snapshot(tmp_path / kind) == before
