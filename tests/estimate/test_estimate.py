"""Estimates against what dumps really write, and distances against plain float64 sums over the whole vocabulary."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from kdcache.config import build
from kdcache.dump import DumpConfig, dump_teacher
from kdcache.errors import CacheError, ConfigError, CorpusError, TeacherError
from kdcache.estimate import (
    EstimateResult,
    HeadLogits,
    Measured,
    Sample,
    estimate_presets,
    measure,
    plan_of,
    student_choices,
)
from kdcache.estimate.rows import Rows, Spread, batch_mean_error, codec_kl, full_kl
from kdcache.estimate.sample import split
from kdcache.losses import LOSSES
from kdcache.models.lm_head import LMHead
from kdcache.presets import PRESETS
from kdcache.schema import Sequence, TargetsRecord
from tests.synthetic import SyntheticCache
from tests.tiny import bpe_tokenizer, llama

VOCAB_SIZE, WIDTH = 40, 6


def settings_for(teacher_dir: Path, corpus_file: Path, **changes: Any) -> dict[str, Any]:
    values = {
        "output": "none",
        "teacher": {"model": str(teacher_dir), "device": "cpu"},
        "corpus": {"paths": [str(corpus_file)]},
        "sequences": {"max_length": 16},
        "batch_tokens": 64,
    }
    return {**values, **changes}


@pytest.fixture(scope="module")
def settings(teacher_dir: Path, corpus_file: Path) -> dict[str, Any]:
    return settings_for(teacher_dir, corpus_file)


@pytest.fixture(scope="module")
def found(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> EstimateResult:
    before = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("empty"))
    try:
        result = estimate_presets(build(DumpConfig, settings), progress=False)
        assert list(Path.cwd().iterdir()) == []  # writes nothing
    finally:
        os.chdir(before)
    return result


# ------------------------------------------------------------------------------------------- against real dumps


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_builds_a_configuration(settings, name):
    config = build(DumpConfig, {**settings, **PRESETS[name].settings})
    assert config.targets.kind in ("top-k", "sampled", "hybrid", "hidden")
    assert PRESETS[name].description


@pytest.mark.parametrize("name", PRESETS)
def test_the_estimate_of_a_whole_corpus_is_what_a_dump_writes(found, settings, tmp_path, name):
    config = build(DumpConfig, {**settings, **PRESETS[name].settings, "output": str(tmp_path / "cache")})
    manifest = dump_teacher(config, progress=False).manifest
    item = next(item for item in found.presets if item.name == name)
    assert item.unavailable is None
    assert item.total_bytes == pytest.approx(manifest.num_bytes, rel=0.005)  # products round otherwise in other batches
    assert set(item.measurement.bytes_by_field) == {*(field.name for field in manifest.fields), "sequences"}
    assert item.cache_files == pytest.approx({f.path: f.num_bytes for f in manifest.cache_files}, rel=0.3)
    statistics = manifest.statistics
    if manifest.targets.kind in ("top-k", "hybrid"):
        assert item.measurement.kept_mass == pytest.approx(
            statistics.kept_mass_sum / statistics.num_positions, rel=0.05
        )


def test_several_shards_cost_what_they_write(settings, tmp_path):
    changed = {**settings, "shard_positions": 100}
    (item,) = estimate_presets(build(DumpConfig, changed), presets=["compact"], progress=False).presets
    manifest = dump_teacher(build(DumpConfig, {**changed, "output": str(tmp_path / "cache")}), progress=False).manifest
    assert manifest.num_shards == 4
    assert item.total_bytes == pytest.approx(manifest.num_bytes, rel=0.1)  # the last shard is not full


def test_corpus_and_teacher_are_described(found, dumped):
    assert (found.num_documents, found.num_sequences) == (10, 27)
    assert found.pilot_positions == found.num_positions == 383
    assert found.teacher_loss > 0
    assert found.teacher_tokens_per_s > 0
    assert [item.name for item in found.presets] == list(PRESETS)
    assert all(item.dump_s > 0 for item in found.presets)


def test_a_pilot_is_a_part_of_the_corpus(settings):
    result = estimate_presets(
        build(DumpConfig, settings), num_positions=60, presets=["compact", "sampled"], progress=False
    )
    assert 60 <= result.pilot_positions < 120  # whole sequences
    assert result.num_positions == 383
    assert [item.name for item in result.presets] == ["compact", "sampled"]
    assert result.presets[0].total_bytes > 0


def test_a_pilot_has_the_positions_that_were_asked_for(settings):
    """Sequences that happen to be shorter than the mean once gave half of them."""
    for wanted, least in ((20, 20), (100, 100), (300, 300), (5000, 383)):
        result = estimate_presets(build(DumpConfig, settings), num_positions=wanted, presets=["exact"], progress=False)
        assert least <= result.pilot_positions <= min(wanted + 64, 383)
        assert 0 < result.pilot_sequences <= 27


def test_the_whole_corpus_has_no_interval_and_a_pilot_has_one(found, settings):
    for item in found.presets:
        assert item.measurement.bytes_interval == (item.measurement.bytes_per_token,) * 2
    result = estimate_presets(build(DumpConfig, settings), num_positions=100, presets=["compact"], progress=False)
    low, high = result.presets[0].measurement.bytes_interval
    assert low < result.presets[0].measurement.bytes_per_token < high
    assert result.to_dict()["presets"][0]["measurement"]["bytes_interval"] == [low, high]


def test_losses_of_the_presets_are_in_their_order(found):
    by_name = {item.name: item.measurement for item in found.presets}
    assert by_name["exact"].codec_kl == pytest.approx(0, abs=1e-9)
    assert by_name["exact"].codec_kl < by_name["fp16"].codec_kl < by_name["bf16"].codec_kl
    assert by_name["compact"].codec_kl < 5e-4
    assert by_name["compact"].full_kl["uniform"] < by_name["compact-32"].full_kl["uniform"]
    assert by_name["hidden"].full_kl["full"] < by_name["hidden-int8"].full_kl["full"] < 1e-3
    assert by_name["sampled"].full_kl == {}
    assert by_name["sampled"].kept_mass is None


def test_json_is_valid_and_names_every_preset(found):
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    text = json.dumps(found.to_dict())
    read = json.loads(text, parse_constant=refuse)
    assert [row["name"] for row in read["presets"]] == list(PRESETS)
    assert read["presets"][0]["measurement"]["full_kl"]["renormalise"] is None  # infinite


@pytest.mark.parametrize("packing", ["none", "window"])
def test_a_teacher_whose_head_cannot_be_split(settings, found, packing, monkeypatch):
    monkeypatch.setattr("kdcache.models.bodies.split_model", lambda model: None)
    sequences = {"max_length": 16, "packing": packing}
    result = estimate_presets(build(DumpConfig, {**settings, "sequences": sequences}), progress=False)
    reasons = {item.name: item.unavailable for item in result.presets}
    assert {name for name, reason in reasons.items() if reason} == {"hidden", "hidden-int8"}
    assert "cannot be rebuilt" in str(reasons["hidden"])
    assert all(item.measurement is None for item in result.presets if item.unavailable)
    if packing == "none":  # the same teacher, so the same numbers
        for mine, other in zip(result.presets, found.presets, strict=True):
            if mine.measurement is not None:
                assert mine.measurement.full_kl == pytest.approx(other.measurement.full_kl, rel=1e-3)


# ---------------------------------------------------------------------------------------------------- mistakes


def test_an_unknown_preset(settings):
    with pytest.raises(ConfigError, match=r"unknown preset 'compct'; did you mean 'compact'\?"):
        estimate_presets(build(DumpConfig, settings), presets=["compct"], progress=False)


def test_a_pilot_of_nothing(settings):
    with pytest.raises(ConfigError, match="at least one position, found 0"):
        estimate_presets(build(DumpConfig, settings), num_positions=0, progress=False)


def test_fewer_ids_than_a_preset_keeps(tmp_path, corpus_file, settings, monkeypatch):
    import kdcache.estimate.run as run

    real = run.PRESETS["compact"]
    changed = type(real)("too many", {"targets": {"kind": "top-k", "top_k": 5000}})
    monkeypatch.setattr(run, "PRESETS", {"compact": real, "huge": changed})
    small, huge = estimate_presets(build(DumpConfig, settings), progress=False).presets
    assert small.unavailable is None
    assert "5000" in str(huge.unavailable)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"teacher": {"model": "/no/such/model"}}, TeacherError),
        ({"corpus": {"paths": ["/no/such/corpus.txt"]}}, CorpusError),
    ],
    ids=["teacher", "corpus"],
)
def test_teachers_and_corpora_that_are_not_there(settings, changes, error):
    with pytest.raises(error, match="/no/such"):
        estimate_presets(build(DumpConfig, {**settings, **changes}), progress=False)


def test_nan_weights(tmp_path, corpus_file):
    tokenizer = bpe_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    model = llama(len(tokenizer))
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = torch.nan
    model.save_pretrained(tmp_path)
    with pytest.raises(TeacherError, match="NaN or infinite"):
        estimate_presets(build(DumpConfig, settings_for(tmp_path, corpus_file)), progress=False)


def test_settings_that_presets_decide_are_said_to_play_no_part(settings, caplog):
    changed = {**settings, "targets": {"top_k": 3}}
    estimate_presets(build(DumpConfig, changed), presets=["compact-32"], progress=False)
    assert "targets and hidden_states are ignored" in caplog.text


# --------------------------------------------------------------------------------------- distances, the long way


def make_sample(num_positions: int = 64, *, seed: int = 0) -> Sample:
    generator = np.random.default_rng(seed)
    sizes = [7, 1, num_positions - 8] if num_positions > 8 else [num_positions]
    sequences = [
        Sequence(n, generator.integers(0, VOCAB_SIZE, size + 1).astype(np.uint32), np.ones(size, np.uint8))
        for n, size in enumerate(sizes)
    ]
    states = generator.normal(size=(num_positions, WIDTH)).astype(np.float32)
    head = LMHead(torch.from_numpy(generator.normal(size=(VOCAB_SIZE, WIDTH)).astype(np.float32)))
    return Sample(sequences, pa.table({"sequence": np.arange(len(sizes))}), VOCAB_SIZE, HeadLogits(states, head))


def test_intervals_of_pilots_hold_the_bytes_of_the_corpus_they_come_from():
    """Of a corpus whose sequences differ: some are certain, some are not, and what is ragged depends on it."""
    generator = np.random.default_rng(1)
    sizes = generator.integers(5, 40, 200)
    head = LMHead(torch.from_numpy(generator.normal(size=(VOCAB_SIZE, WIDTH)).astype(np.float32)))
    scales_P = np.repeat(generator.uniform(0.2, 3, len(sizes)), sizes)
    states = (generator.normal(size=(sizes.sum(), WIDTH)) * scales_P[:, None]).astype(np.float32)
    sequences = [
        Sequence(n, generator.integers(0, VOCAB_SIZE, size + 1).astype(np.uint32), np.ones(size, np.uint8))
        for n, size in enumerate(sizes.tolist())
    ]
    table = pa.table({"sequence": np.arange(len(sizes))})
    corpus = Sample(sequences, table, VOCAB_SIZE, HeadLogits(states, head))
    whole = measured(corpus, ragged={"targets": {"top_k": 20, "min_prob": 0.01}}, num_positions=int(sizes.sum()))
    plan_positions, truth = int(sizes.sum()), whole.presets["ragged"].bytes_per_token
    held, widths = [], []
    for trial in range(10):
        part, rows = corpus.part(np.sort(np.random.default_rng(trial).permutation(len(sizes))[:30]))
        pilot = Sample(part.sequences, part.table, VOCAB_SIZE, HeadLogits(states[rows], head))
        found = measured(pilot, ragged={"targets": {"top_k": 20, "min_prob": 0.01}}, num_positions=plan_positions)
        low, high = found.presets["ragged"].bytes_interval
        held.append(low <= truth <= high)
        widths.append((high - low) / truth)
    assert np.mean(held) >= 0.8
    assert np.mean(widths) < 0.5, "an interval that holds everything says nothing"


def measured(sample: Sample, *, num_positions: int | None = None, **presets: dict[str, Any]) -> Measured:
    base = SyntheticCache(vocab_size=VOCAB_SIZE).plan()
    if num_positions is not None:
        base = base.model_copy(update={"num_positions": num_positions})
    plans = {}
    for name, settings in presets.items():
        config = build(
            DumpConfig, {"output": "none", "teacher": {"model": "none"}, "corpus": {"paths": ["none"]}, **settings}
        )
        plans[name] = plan_of(config, base, sample.logits.states_PD)
    return measure(sample, plans)


def dense_probs(sample: Sample, states_PD: np.ndarray | None = None) -> np.ndarray:
    states = sample.logits.states_PD if states_PD is None else states_PD
    logits = states.astype(np.float64) @ sample.logits.head.weight_VD.numpy().astype(np.float64).T
    exps = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exps / exps.sum(axis=1, keepdims=True)


def dense_kl(t_PV: np.ndarray, c_PV: np.ndarray) -> float:
    return float((t_PV * (np.log(t_PV) - np.log(c_PV))).sum(axis=1).mean())


def completed(targets: Any, weights_PV: np.ndarray) -> np.ndarray:
    """The decoded row as a distribution over the vocabulary, one position after another."""
    dense = np.zeros_like(weights_PV)
    for p in range(len(dense)):
        count = targets.top_k if targets.num_kept_P is None else int(targets.num_kept_P[p])
        ids = targets.ids_PK[p, :count]
        outside = np.setdiff1d(np.arange(VOCAB_SIZE), ids)
        dense[p, outside] = np.exp(targets.log_tail_P[p]) * weights_PV[p, outside] / weights_PV[p, outside].sum()
        dense[p, ids] = np.exp(targets.logprobs_PK[p, :count])
    return dense


@pytest.mark.parametrize("codec", ["compact", "fp16", "exact"])
@pytest.mark.parametrize("changes", [{"top_k": 4}, {"top_k": 9, "min_prob": 0.05}], ids=["fixed", "ragged"])
def test_distances_of_kept_ids(codec, changes):
    sample = make_sample()
    result = measured(sample, one={"targets": {"kind": "top-k", "codec": codec, **changes}})
    row, stored = result.presets["one"], result.stored["one"].targets
    t_PV = dense_probs(sample)
    kept_PV = np.zeros((64, VOCAB_SIZE), dtype=bool)
    for p in range(64):  # pads repeat an id that is kept
        kept_PV[p, stored.ids_PK[p]] = True
    tails_PV = np.where(kept_PV, 0.0, t_PV)
    priors = [tails_PV[sample.half_P != half].mean(axis=0) for half in (0, 1)]  # of the other half
    weights = {"uniform": np.ones((64, VOCAB_SIZE)), "prior": np.stack([priors[h] for h in sample.half_P])}
    for name, weights_PV in weights.items():
        c_PV = completed(stored, weights_PV)
        np.testing.assert_allclose(c_PV.sum(axis=1), 1, atol=2e-3)
        assert row.full_kl[name] == pytest.approx(dense_kl(t_PV, c_PV), rel=1e-4)
        error = np.linalg.norm(c_PV.mean(axis=0) - t_PV.mean(axis=0))
        assert row.batch_mean_error[name] == pytest.approx(error, rel=1e-4)
    dropped_PV = np.where(kept_PV, completed(stored, weights["uniform"]), 0)
    scaled_PV = dropped_PV / dropped_PV.sum(axis=1, keepdims=True)
    for name, target_PV in {"drop": dropped_PV, "renormalise": scaled_PV}.items():
        error = np.linalg.norm(target_PV.mean(axis=0) - t_PV.mean(axis=0))
        assert row.batch_mean_error[name] == pytest.approx(error, rel=1e-4)
    assert row.full_kl["renormalise"] == np.inf
    assert row.kept_mass == pytest.approx(np.where(kept_PV, t_PV, 0).sum(axis=1).mean(), rel=1e-5)
    tail_P = tails_PV.sum(axis=1)
    exact_head = np.where(kept_PV, t_PV * (np.log(t_PV) - np.log(np.where(kept_PV, dropped_PV, 1))), 0).sum(axis=1)
    expected = (exact_head + tail_P * (np.log(tail_P) - stored.log_tail_P)).mean()
    assert row.codec_kl == pytest.approx(expected, rel=1e-3, abs=1e-7)
    exact = measured(sample, one={"targets": {"kind": "top-k", "codec": "exact", **changes}}).presets["one"]
    assert row.within_tail_kl == pytest.approx(exact.full_kl["uniform"], abs=1e-6)


@pytest.mark.parametrize("settings", [{"kind": "sampled", "num_samples": 7}, {"kind": "hybrid", "top_k": 3}], ids=str)
def test_distances_of_draws(settings):
    sample = make_sample()
    result = measured(sample, one={"targets": settings})
    row, stored = result.presets["one"], result.stored["one"].targets
    dense = np.zeros((64, VOCAB_SIZE))
    for p in range(64):
        dense[p, stored.ids_PK[p]] = np.exp(stored.logprobs_PK[p])
        counts = stored.samples.counts_PJ[p].astype(float)
        np.add.at(dense[p], stored.samples.ids_PJ[p], np.exp(stored.log_tail_P[p]) * counts / counts.sum())
    np.testing.assert_allclose(dense.sum(axis=1), 1, atol=1e-3)
    error = np.linalg.norm((dense - dense_probs(sample)).mean(axis=0))
    assert row.batch_mean_error == {"samples": pytest.approx(error, rel=1e-4)}
    assert (row.codec_kl, row.within_tail_kl, row.full_kl) == (None, None, {})


@pytest.mark.parametrize("codec", ["bf16", "int8", "exact"])
def test_distances_of_states(codec):
    sample = make_sample()
    result = measured(sample, one={"targets": {"kind": "hidden"}, "hidden_states": {"codec": codec}})
    row = result.presets["one"]
    t_PV, q_PV = dense_probs(sample), dense_probs(sample, result.stored["one"].states["hidden-2"])
    assert row.full_kl["full"] == pytest.approx(dense_kl(t_PV, q_PV), rel=1e-3, abs=1e-7)  # float32 sums
    error = np.linalg.norm((q_PV - t_PV).mean(axis=0))
    assert row.batch_mean_error["full"] == pytest.approx(error, rel=1e-3, abs=1e-9)
    assert row.kept_mass == 1.0
    assert (row.full_kl["full"] == 0) is (codec == "exact")


@pytest.mark.parametrize("num_positions", [1, 2, 9, 300, 5000])
def test_samples_of_any_size(num_positions):
    sample = make_sample(num_positions)
    presets = {name: preset.settings for name, preset in PRESETS.items()}
    for name in ("compact", "fp16", "bf16", "exact", "compact-32", "ragged"):  # there are only 40 ids
        targets = dict(presets[name]["targets"])
        presets[name] = {**presets[name], "targets": {**targets, "top_k": 8}}
    result = measured(sample, **presets)
    for name, row in result.presets.items():
        assert row.bytes_per_token > 0
        assert all(np.isfinite(error) for error in row.batch_mean_error.values())
        assert result.stored[name].targets.num_positions == num_positions
    # One position cannot judge the prior that was made of it.
    assert ("prior" in result.presets["compact"].full_kl) is (num_positions > 1)


def test_a_row_of_the_whole_vocabulary_has_no_tail():
    row = measured(make_sample(), one={"targets": {"top_k": VOCAB_SIZE, "codec": "exact"}}).presets["one"]
    assert row.full_kl == pytest.approx(dict.fromkeys(row.full_kl, 0.0), abs=1e-6)
    assert row.within_tail_kl == pytest.approx(0, abs=1e-6)


def test_a_codec_that_gives_back_other_ids_is_a_defect():
    tail = np.array([-3.0])
    rows = Rows.of(np.array([[1, 2]]), np.array([[-0.1, -2.0]]), tail, 5)
    other = Rows.of(np.array([[1, 3]]), np.array([[-0.1, -2.0]]), tail, 5)
    assert codec_kl(rows, rows) == 0
    with pytest.raises(CacheError, match="other ids"):
        codec_kl(rows, other)


def test_rows_are_sorted_with_pads_last():
    rows = Rows.of(np.array([[3, 1, 3, 3]]), np.array([[-0.1, -3.0, -np.inf, -np.inf]]), np.array([-4.0]), 5)
    np.testing.assert_array_equal(rows.ids_PJ, [[1, 3, 5, 5]])
    np.testing.assert_array_equal(rows.num_kept_P, [2])
    spread = Spread.uniform(5, 1)
    np.testing.assert_array_equal(spread.outside(rows), [3])
    assert np.isfinite(full_kl(rows, rows, np.array([0.5]), spread))
    assert batch_mean_error(rows, np.array([[0, 0, 0, 1.0, 0]])) > 0


def test_rows_are_cut_at_the_multiples_of_a_block():
    assert list(split(slice(3, 11), 4)) == [slice(3, 4), slice(4, 8), slice(8, 11)]
    assert list(split(slice(4, 8), 4)) == [slice(4, 8)]
    assert list(split(slice(5, 7), 4)) == [slice(5, 7)]


# ----------------------------------------------------------------------------------------------- what is allowed


def choices(**settings: Any) -> dict[str, Any]:
    return {choice.loss: choice for choice in student_choices(TargetsRecord(**settings), VOCAB_SIZE)}


def test_every_loss_is_asked():
    assert list(choices()) == list(LOSSES)


def test_what_students_may_choose():
    top_k = choices(tail_prior=True, temperatures=(0.5, 2.0))["forward_kl"]
    assert set(top_k.tails) >= {"bucket", "prior", "uniform"}
    assert top_k.modes == {"decoupled": "any", "grid": "0.5, 2"}
    assert choices(temperatures=(0.5, 2.0))["jensen_shannon"].modes == {"grid": "0.5, 2"}
    assert "prior" not in choices()["forward_kl"].tails
    assert choices()["forward_kl"].modes == {"decoupled": "any"}
    drawn = choices(kind="sampled", top_k=0, num_samples=5)["forward_kl"]
    assert (drawn.tails, drawn.modes) == (("bucket",), {})
    assert choices(kind="hidden", top_k=1)["forward_kl"].modes["full"] == "any"
    assert choices()["cross_entropy"].incompatibility is None
    hybrid = choices(kind="hybrid", top_k=3, num_samples=5)
    assert all(choice.incompatibility is None for choice in hybrid.values())
    assert (hybrid["reverse_kl"].modes, hybrid["skew_kl"].modes) == ({"decoupled": "any"}, {})
    sampled = choices(kind="sampled", top_k=0, num_samples=5)
    assert {name for name, choice in sampled.items() if choice.incompatibility is None} == {
        "forward_kl",
        "cross_entropy",
    }
