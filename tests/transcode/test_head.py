"""From hidden states and the LM head to every kind of targets, with a tiny real teacher."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from kdcache.cache import open_cache
from kdcache.dump import dump_teacher
from kdcache.errors import ConfigError, CorruptCacheError
from kdcache.schema import TargetsRecord
from kdcache.transcode import preview_transcoding, transcode_cache
from tests.dump.test_dump_teacher import config_for as dump_config
from tests.synthetic import SyntheticCache
from tests.transcode.test_cut import compare
from tests.transcode.test_transcode import config_for, opened, transcode

KINDS = {
    "top-k": {"kind": "top-k", "top_k": 9},
    "grid and prior": {"kind": "top-k", "top_k": 5, "temperatures": [0.5, 4.0], "tail_prior": True},
    "ragged": {"kind": "top-k", "top_k": 20, "min_prob": 0.01, "tail_prior": False},
    "sampled": {"kind": "sampled", "num_samples": 20, "seed": 3},
    "hybrid": {"kind": "hybrid", "top_k": 4, "num_samples": 7},
    "more ids": {"kind": "hidden", "top_k": 6},
}


@pytest.fixture(scope="module")
def dump_of(tmp_path_factory, corpus_file, teacher_dir):
    """Dump a kind of targets, packed, once per kind."""
    made: dict[str, Path] = {}

    def dump(**changes: Any) -> Path:
        key = repr(changes)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("dump") / "cache"
            dump_teacher(dump_config(teacher_dir, corpus_file, made[key], **changes), progress=False)
        return made[key]

    return dump


def hidden(codec: str = "exact", packing: str = "none") -> dict[str, Any]:
    return {
        "targets": {"kind": "hidden", "codec": "exact"},
        "hidden_states": {"codec": codec, "layers": [1]},
        "sequences": {"max_length": 16, "packing": packing},
    }


@pytest.mark.parametrize("packing", ["none", "window"])
@pytest.mark.parametrize("kind", KINDS)
def test_equal_to_a_dump(tmp_path, dump_of, kind, packing):
    changes = {**hidden(packing=packing), "targets": {**KINDS[kind], "codec": "exact"}}
    expected = opened(dump_of(**changes))
    transcode(dump_of(**hidden(packing=packing)), tmp_path, targets=KINDS[kind], batch_positions=50)
    made = opened(tmp_path)
    assert made.manifest.targets == expected.manifest.targets
    assert made.manifest.field("targets") == expected.manifest.field("targets")
    before, after = (c.read(range(len(c))) for c in (expected, made))
    np.testing.assert_array_equal(before.tokens_T, after.tokens_T)
    drawn = [batch.targets.samples for batch in (before, after)]
    if drawn[0] is not None:
        np.testing.assert_array_equal(
            drawn[0].ids_PJ * (drawn[0].counts_PJ > 0), drawn[1].ids_PJ * (drawn[1].counts_PJ > 0)
        )
        np.testing.assert_array_equal(drawn[0].counts_PJ, drawn[1].counts_PJ)
    before.targets.samples = after.targets.samples = None
    compare(after.targets, before.targets, atol=2e-5)
    if made.manifest.targets.tail_prior:
        np.testing.assert_allclose(made.tail_prior_V, expected.tail_prior_V, atol=1e-6)
    assert made.manifest.hidden_layers == (("hidden-1", "hidden-2") if kind == "more ids" else ("hidden-1",))
    assert (tmp_path / "lm_head.safetensors").exists() is (kind == "more ids")


@pytest.mark.parametrize("codec", ["bf16", "int8"])
def test_rounded_states_give_nearly_the_same(tmp_path, dump_of, codec):
    exact = opened(dump_of(**{**hidden(), "targets": {"top_k": 9, "codec": "exact"}}))
    transcode(dump_of(**hidden(codec)), tmp_path, targets=KINDS["top-k"])
    made = opened(tmp_path)
    before, after = (c.read(range(len(c))).targets for c in (exact, made))
    assert 0 < np.abs(before.log_tail_P - after.log_tail_P).mean() < 0.05
    # What the source knows exactly does not come from its states.
    np.testing.assert_allclose(after.gold_logprob_P, before.gold_logprob_P, atol=2e-5)
    np.testing.assert_allclose(after.entropy_P, before.entropy_P, atol=2e-5)


def test_draws_of_a_sequence_do_not_depend_on_the_filter(tmp_path, dump_of):
    source = dump_of(**hidden())
    transcode(source, tmp_path / "all", targets=KINDS["sampled"])
    transcode(source, tmp_path / "some", targets=KINDS["sampled"], where="num_positions > 9 and sequence > 2")
    chosen = np.flatnonzero(open_cache(str(source)).lengths_N > 9)
    every, some = opened(tmp_path / "all"), opened(tmp_path / "some")
    before, after = every.read(chosen[chosen > 2]).targets.samples, some.read(range(len(some))).targets.samples
    np.testing.assert_array_equal(before.counts_PJ.sum(1), 20)
    for n in range(len(after.ids_PJ)):
        pairs = [sorted(zip(d.ids_PJ[n], d.counts_PJ[n], strict=True)) for d in (before, after)]
        assert [p for p in pairs[0] if p[1]] == [p for p in pairs[1] if p[1]]


def test_a_bfloat16_teacher(tmp_path, dump_of, teacher_dir):
    teacher = {"teacher": {"model": str(teacher_dir), "device": "cpu", "dtype": "bfloat16"}}
    expected = opened(dump_of(**teacher, **{**hidden(), "targets": {"top_k": 9, "codec": "exact"}}))
    transcode(dump_of(**teacher, **hidden("bf16")), tmp_path, targets=KINDS["top-k"])
    before, after = (c.read(range(len(c))).targets for c in (expected, opened(tmp_path)))
    # The states of a bfloat16 teacher are stored as they are, so only the product may round in another order.
    assert np.abs(before.log_tail_P - after.log_tail_P).mean() < 2e-3
    np.testing.assert_array_equal(before.ids_PK[:, 0], after.ids_PK[:, 0])


def test_the_last_state_stays_if_it_is_named(tmp_path, dump_of):
    transcode(dump_of(**hidden()), tmp_path, targets=KINDS["top-k"], hidden_states={"layers": "last", "codec": "int8"})
    made = opened(tmp_path)
    assert made.manifest.hidden_layers == ("hidden-2",)
    assert 0 < made.manifest.field("hidden-2").relative_error < 0.02


def test_the_kind_hidden_stays_itself(tmp_path, dump_of):
    source = dump_of(**hidden())
    transcode(source, tmp_path, hidden_states={"layers": [], "codec": "bf16"}, where="num_positions > 3")
    made = opened(tmp_path)
    assert made.manifest.hidden_layers == ("hidden-2",)
    assert made.lm_head_file() == open_cache(str(source)).lm_head_file()


def test_one_dump_serves_a_chain(tmp_path, dump_of):
    transcode(dump_of(**hidden()), tmp_path / "wide", targets={"kind": "top-k", "top_k": 40, "tail_prior": True})
    transcode(tmp_path / "wide", tmp_path / "narrow", targets={"top_k": 6})
    transcode(dump_of(**hidden()), tmp_path / "direct", targets={"kind": "top-k", "top_k": 6, "tail_prior": True})
    narrow, direct = opened(tmp_path / "narrow"), opened(tmp_path / "direct")
    compare(narrow.read(range(len(narrow))).targets, direct.read(range(len(direct))).targets, atol=2e-5)
    np.testing.assert_allclose(narrow.tail_prior_V, direct.tail_prior_V, atol=1e-6)


def test_a_dry_run_from_hidden_states(tmp_path, dump_of):
    source = dump_of(**hidden(), shard_positions=5000)
    config = config_for(source, tmp_path / "made", targets={"kind": "sampled", "codec": "compact"})
    estimate = preview_transcoding(config)
    assert not (tmp_path / "made").exists()
    manifest = transcode_cache(config, progress=False).manifest
    assert estimate.bytes_per_token == pytest.approx(manifest.bytes_per_token, rel=0.05)
    assert estimate.targets["num_samples"] == 50


def test_more_ids_than_there_are(tmp_path, dump_of):
    with pytest.raises(ConfigError, match=r"top_k 5000 is more than the \d+ ids of its vocabulary"):
        transcode(dump_of(**hidden()), tmp_path / "made", targets={"kind": "top-k", "top_k": 5000})


def test_a_damaged_head(tmp_path):
    SyntheticCache(record=TargetsRecord(kind="hidden", top_k=1)).write(tmp_path / "source")
    path = tmp_path / "source" / "lm_head.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    for targets in ({"kind": "top-k", "top_k": 3}, {}):
        with pytest.raises(CorruptCacheError, match=r"lm_head.safetensors is damaged"):
            transcode(tmp_path / "source", tmp_path / "made", targets=targets)


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (np.nan, r"shard 1, field hidden-2, file .*: array states, row 4, column 0: nan is not finite"),
        (3e38, "NaN or infinite logits of the states of sequence 6"),
    ],
)
def test_states_that_give_no_logits(tmp_path, state, words):
    source = SyntheticCache(record=TargetsRecord(kind="hidden", top_k=1))
    source.states[6]["hidden-2"][:] = state
    weight = np.full((50, 6), 4, np.float32)
    head = {"lm_head.safetensors": save({"weight": weight}, metadata={"lm_head": '{"scale": 1.0, "softcap": null}'})}
    source.cache_files = lambda: head
    source.write(tmp_path / "source")
    with pytest.raises(CorruptCacheError, match=words):
        transcode(tmp_path / "source", tmp_path / "made", targets={"kind": "top-k", "top_k": 3})


SCRIPT = """
import sys
from kdcache.transcode import TranscodeConfig, transcode_cache
changes = {"targets": {"codec": "compact"}, "where": "num_positions > 2"}
transcode_cache(TranscodeConfig(source=sys.argv[1], output=sys.argv[2], **changes), progress=False)
print(sorted({"torch", "transformers", "datasets"} & set(sys.modules)))
"""


def test_only_targets_from_hidden_states_need_torch(tmp_path):
    SyntheticCache(record=TargetsRecord(kind="hidden", top_k=1)).write(tmp_path / "source")
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "source"), str(tmp_path / "made")]
    root = Path(__file__).parents[2]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "[]"
