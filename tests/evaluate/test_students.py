from __future__ import annotations

import json
import weakref

import numpy as np
import pytest
import torch

from kdcache.cache import open_cache, reader
from kdcache.errors import CacheError, ConfigError, StudentError
from kdcache.evaluate import evaluate_students
from kdcache.evaluate import run as evaluation
from kdcache.evaluate.distributions import DistributionScorer
from kdcache.students import load_student
from tests.tiny import bpe_tokenizer, llama, make_cache, random_sequences

TOKENIZER = bpe_tokenizer()
VOCAB_SIZE = len(TOKENIZER)


@pytest.fixture(scope="module")
def teacher():
    return llama(VOCAB_SIZE, seed=5)


@pytest.fixture(scope="module")
def sequences(teacher):
    # Half of the tokens are the teacher's favourites, so that accuracies are neither 0 nor 1.
    drawn = random_sequences(12, VOCAB_SIZE, seed=2)
    for tokens in drawn:
        for position in range(1, len(tokens), 2):
            prefix = torch.from_numpy(tokens[:position].astype(np.int64))[None]
            tokens[position] = teacher(input_ids=prefix).logits[0, -1].argmax()
    return drawn


@pytest.fixture(scope="module")
def cache_path(tmp_path_factory, teacher, sequences):
    return str(make_cache(tmp_path_factory.mktemp("evaluate") / "cache", teacher, TOKENIZER, sequences, top_k=8))


@pytest.fixture(scope="module")
def student_path(tmp_path_factory, teacher):
    """A student with padding rows, close to the teacher but not equal."""
    student = llama(VOCAB_SIZE + 6, seed=5)
    weights = teacher.state_dict()
    rows = student.get_input_embeddings().weight.detach()
    # Padding rows that would win every argmax if they were not left out.
    rows[:VOCAB_SIZE], rows[VOCAB_SIZE:] = weights["model.embed_tokens.weight"], 5.0
    noisy = {n: w + 0.05 * torch.randn(w.shape, generator=torch.Generator().manual_seed(1)) for n, w in weights.items()}
    noisy["model.embed_tokens.weight"] = noisy["lm_head.weight"] = rows
    student.load_state_dict(noisy)
    path = tmp_path_factory.mktemp("evaluate") / "student"
    student.save_pretrained(path)
    TOKENIZER.save_pretrained(path)
    return str(path), student


def run(cache_path, *students, **options):
    return evaluate_students(cache_path, list(students), device="cpu", progress=False, **options)


def oracle(model, teacher, cache_path, sequences, top_k=8):
    """Every number from whole float64 log-softmaxes, one sequence at a time."""
    cache = open_cache(cache_path)
    columns = {name: [] for name in ("loss", "kl", "agreement", "correct", "confidence", "entropy", "kept")}
    for index, tokens in enumerate(sequences):
        tokens = torch.from_numpy(tokens.astype(np.int64))
        mask = torch.from_numpy(cache.read([index]).loss_mask_P.astype(bool))
        with torch.no_grad():
            log_t, log_p = (
                m(input_ids=tokens[None, :-1]).logits[0, mask, :VOCAB_SIZE].double().log_softmax(-1)
                for m in (teacher, model)
            )
        gold, ids = tokens[1:][mask], log_t.argsort(descending=True)
        coarse_t, coarse_p = (
            torch.cat([x[:, :top_k], x[:, top_k:].logsumexp(-1, keepdim=True)], -1)
            for x in (log_t.gather(1, ids), log_p.gather(1, ids))
        )
        columns["loss"].append(-log_p.gather(1, gold[:, None])[:, 0])
        columns["kl"].append((coarse_t.exp() * (coarse_t - coarse_p)).sum(-1))
        columns["agreement"].append((log_p.argmax(-1) == log_t.argmax(-1)).double())
        columns["correct"].append((log_p.argmax(-1) == gold).double())
        columns["confidence"].append(log_p.max(-1).values.exp())
        columns["entropy"].append(-(log_t.exp() * log_t).sum(-1))
        columns["kept"].append(coarse_t[:, :top_k].exp().sum(-1))
    return {name: torch.cat(values).numpy() for name, values in columns.items()}


def calibration_error(confidence, correct):
    error = 0.0
    for low in np.arange(15) / 15:
        inside = (confidence > low) & (confidence <= low + 1 / 15)
        if inside.any():
            error += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean())
    return error


def test_numbers_equal_a_dense_oracle(teacher, cache_path, student_path, sequences):
    path, model = student_path
    result = run(cache_path, path)
    expected = oracle(model, teacher, cache_path, sequences)
    [row] = result.students
    assert row.loss == pytest.approx(expected["loss"].mean(), rel=1e-5)
    assert row.perplexity == pytest.approx(np.exp(expected["loss"].mean()), rel=1e-4)
    assert row.kl == pytest.approx(expected["kl"].mean(), rel=1e-4)
    assert row.agreement == pytest.approx(expected["agreement"].mean())
    assert row.top1_accuracy == pytest.approx(expected["correct"].mean())
    assert row.ece == pytest.approx(calibration_error(expected["confidence"], expected["correct"]), rel=1e-4)
    assert 0.05 < row.top1_accuracy < row.agreement < 1, "the example tells these apart"
    assert row.num_parameters == model.num_parameters()
    assert row.num_bytes >= 4 * model.num_parameters()
    assert row.tokens_per_s > 0
    assert result.num_targets == len(expected["loss"]) < sum(len(s) - 1 for s in sequences)


def test_teacher_row_comes_from_the_cache_and_equals_the_teacher(teacher, cache_path, sequences, tmp_path):
    expected = oracle(teacher, teacher, cache_path, sequences)
    row = run(cache_path).teacher
    assert row.loss == pytest.approx(expected["loss"].mean(), rel=1e-5)
    assert row.entropy == pytest.approx(expected["entropy"].mean(), rel=1e-5)
    assert row.kept_mass == pytest.approx(expected["kept"].mean(), rel=1e-5)
    assert row.top1_accuracy == pytest.approx(expected["correct"].mean())
    assert row.ece == pytest.approx(calibration_error(expected["confidence"], expected["correct"]), rel=1e-4)
    assert row.num_parameters == teacher.num_parameters()

    teacher.save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    [same] = run(cache_path, str(tmp_path)).students
    assert same.kl == pytest.approx(0, abs=1e-6)
    assert same.agreement == 1
    assert (same.loss, same.ece) == (pytest.approx(row.loss, rel=1e-5), pytest.approx(row.ece, rel=1e-4))


@pytest.mark.parametrize("batch_tokens", [1, 20, 100_000])
def test_batches_do_not_change_the_numbers(cache_path, student_path, batch_tokens):
    one, other = (run(cache_path, student_path[0], batch_tokens=n).students[0] for n in (64, batch_tokens))
    for name in ("loss", "kl", "agreement", "top1_accuracy", "ece"):
        assert getattr(other, name) == pytest.approx(getattr(one, name), rel=1e-5)


@pytest.mark.parametrize("limit", [None, 20])
def test_every_pass_reads_every_shard_once(tmp_path, teacher, student_path, monkeypatch, limit):
    drawn = random_sequences(40, VOCAB_SIZE, seed=3)
    path = str(make_cache(tmp_path / "cache", teacher, TOKENIZER, drawn, num_shards=10))
    loads = []
    load = reader._load
    monkeypatch.setattr(reader, "_load", lambda *given: loads.append(given[2]) or load(*given))
    result = run(path, student_path[0], batch_tokens=20, limit_sequences=limit)
    assert result.num_sequences == (limit or 40)
    assert sorted(loads[:10]) == sorted(loads[10:]) == list(range(10)), "student and teacher, one pass each"


def test_limit_takes_sequences_from_the_whole_cache(cache_path, student_path, teacher, sequences):
    result = run(cache_path, student_path[0], limit_sequences=2)
    assert result.num_sequences == 2
    cache = open_cache(cache_path)
    ends = cache.read([0, len(sequences) - 1])
    assert result.num_targets == ends.loss_mask_P.sum()
    assert result.teacher.loss == pytest.approx(-ends.targets.gold_logprob_P[ends.loss_mask_P > 0].mean(), rel=1e-5)


def test_tables(cache_path, student_path):
    result = run(cache_path, student_path[0])
    lines = result.table().splitlines()
    assert lines[0].split()[:3] == ["model", "parameters", "bytes"]
    assert lines[1].startswith("tiny-teacher (teacher)")
    assert lines[2].startswith(student_path[0])
    assert f"{result.students[0].loss:.4f}" in lines[2]
    columns = [line.count("|") for line in result.table(markdown=True).splitlines()]
    assert len(columns) == 4
    assert len(set(columns)) == 1
    assert json.loads(json.dumps(result.to_dict()))["students"][0]["kl"] == result.students[0].kl


@pytest.mark.parametrize(
    ("same", "warning"), [("fingerprint", "trained on this very cache"), ("corpus", "a cache of the same texts")]
)
def test_numbers_that_are_not_held_out_carry_a_warning(cache_path, student_path, tmp_path, same, warning):
    student_path[1].save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    assert run(cache_path, str(tmp_path)).warnings == ()
    cache = open_cache(cache_path)
    made_on = {"fingerprint": "other", "corpus": "other"}
    made_on[same] = {"fingerprint": cache.fingerprint, "corpus": cache.manifest.corpus.fingerprint}[same]
    (tmp_path / "kdcache_run.json").write_text(json.dumps({"cache": made_on}))
    result = run(cache_path, str(tmp_path))
    assert warning in result.warnings[0]
    assert f"warning: {result.warnings[0]}" in result.table()


def test_student_with_another_tokenizer_is_refused(cache_path, tmp_path):
    llama(VOCAB_SIZE).save_pretrained(tmp_path)
    bpe_tokenizer(lowercase=True).save_pretrained(tmp_path)
    with pytest.raises(StudentError, match="another tokenizer"):
        run(cache_path, str(tmp_path))


def test_mistakes(cache_path, tmp_path):
    with pytest.raises(StudentError, match="there is no model at"):
        run(cache_path, str(tmp_path / "nothing"))
    with pytest.raises(CacheError):
        run(str(tmp_path / "nothing"))
    with pytest.raises(ConfigError, match="batch_tokens must be at least 1, found 0"):
        run(cache_path, batch_tokens=0)
    with pytest.raises(ConfigError, match="device 'gpu' cannot be used"):
        evaluate_students(cache_path, [], device="gpu")
    with pytest.raises(ConfigError, match="limit_sequences must be at least 1, found 0"):
        run(cache_path, limit_sequences=0)


def test_student_with_nan_weights_is_refused(cache_path, tmp_path):
    student = llama(VOCAB_SIZE)
    with torch.no_grad():
        student.model.norm.weight[0] = torch.nan
    student.save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    with pytest.raises(StudentError, match=r"NaN or infinite.*model.norm.weight.*lower learning rate"):
        run(cache_path, str(tmp_path))


def test_a_perplexity_beyond_all_numbers_is_null_in_json(cache_path):
    result = run(cache_path)
    data = result.model_copy(update={"teacher": result.teacher.model_copy(update={"perplexity": np.inf})}).to_dict()
    assert json.loads(json.dumps(data, allow_nan=False))["teacher"]["perplexity"] is None


def test_one_student_is_in_memory_at_a_time(cache_path, student_path, monkeypatch):
    alive: list[weakref.ref] = []

    def watched(*given, **options):
        assert all(reference() is None for reference in alive), "the student before is still in memory"
        student = load_student(*given, **options)
        alive.append(weakref.ref(student.model))
        return student

    monkeypatch.setattr(evaluation, "load_student", watched)
    path = student_path[0]
    names = [str(path), f"{path}/", f"{path}/."]
    result = evaluate_students(str(cache_path), names, device="cpu", progress=True)
    assert len(alive) == 3 + 2, "the first is evaluated as it was checked"
    assert [row.model for row in result.students] == names
    assert len({row.loss for row in result.students}) == 1


def test_a_student_that_cannot_be_loaded_is_found_before_any_is(cache_path, student_path, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "load_student", lambda *given, **options: pytest.fail("a student was loaded"))
    with pytest.raises(StudentError, match="there is no model at"):
        evaluate_students(str(cache_path), [str(student_path[0]), str(tmp_path / "none")], device="cpu", progress=False)


def test_weights_that_cannot_be_used_are_found_before_any_student_is_evaluated(
    cache_path, student_path, tmp_path, monkeypatch
):
    monkeypatch.setattr(DistributionScorer, "student", lambda *given: pytest.fail("a student was evaluated"))
    student = llama(VOCAB_SIZE)
    student.model.norm.weight.data[0] = torch.nan
    student.save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    with pytest.raises(StudentError, match=r"NaN or infinite"):
        run(cache_path, str(student_path[0]), str(tmp_path))


def test_a_filter_selects_the_sequences(cache_path, student_path):
    cache = open_cache(cache_path)
    chosen = cache.where("sequence % 3 == 1").tolist()
    found = cache.read(chosen)
    result = run(cache_path, student_path[0], where="sequence % 3 == 1")
    assert (result.num_sequences, result.num_targets) == (len(chosen), found.loss_mask_P.sum())
    assert result.teacher.loss == pytest.approx(-found.targets.gold_logprob_P[found.loss_mask_P > 0].mean(), rel=1e-5)
    assert result.to_dict()["where"] == "sequence % 3 == 1"
    assert run(cache_path, where="sequence % 3 == 1", limit_sequences=2).num_sequences == 2
    with pytest.raises(ConfigError, match="selects none of the 12 sequences"):
        run(cache_path, where="sequence > 100")
    with pytest.raises(ConfigError, match="unknown column 'sequenze'"):
        run(cache_path, where="sequenze > 1")
