"""The kind of field on the page about extensions: one file that is dumped, read, verified, transcoded, trained on."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from kdcache.cache import open_cache
from kdcache.cache.arrow import to_arrow
from kdcache.config import build
from kdcache.dump import DumpConfig
from kdcache.errors import CacheError
from kdcache.fields import FIELD_KINDS
from kdcache.losses import TERMS
from kdcache.train import TrainConfig, train_student
from kdcache.transcode import TranscodeConfig, transcode_cache
from kdcache.verify.stored import verify_cache
from tests.docs.test_extending import PAGE, titled_blocks
from tests.tiny import SENTENCES as TEXTS
from tests.tiny import bpe_tokenizer, llama


def test_field_of_the_page_is_dumped_read_verified_transcoded_and_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "attended.py").write_text(titled_blocks(PAGE)["attended.py"])
    monkeypatch.syspath_prepend(str(tmp_path))
    # As the entry points of an installed package do.
    monkeypatch.setitem(FIELD_KINDS._rows, "attended", "attended:AttendedField")
    monkeypatch.setitem(TERMS._rows, "attended", "attended:PredictAttended")
    attended = importlib.import_module("attended")
    tokenizer = bpe_tokenizer()
    for name, seed in (("teacher", 1), ("student", 2)):
        llama(len(tokenizer), seed=seed).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    path = str(tmp_path / "cache")
    settings = {
        "output": path,
        "teacher": {"model": str(tmp_path / "teacher")},
        "corpus": {"paths": [str(tmp_path / "texts.jsonl")]},
        "sequences": {"max_length": 24},
        "targets": {"top_k": 6},
        "shard_positions": 60,
    }
    attended.dump_attended(build(DumpConfig, settings), k=3)

    # Read: what the model's own attention says, in any order, and nothing of it unless asked for.
    cache = open_cache(path)
    assert [field.kind for field in cache.manifest.fields] == ["tokens", "targets", "attended"]
    assert cache.manifest.num_shards > 1
    assert set(cache.read([1, 0]).fields) == {"targets"}
    order = [len(cache) - 1, 0, 2]
    batch = cache.read(order, fields=["attended"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "teacher", attn_implementation="eager").eval()
    for n, tokens in enumerate(s.tokens_T for s in batch.sequences()):
        distances = batch.fields["attended"][batch.position_offsets_N1[n] : batch.position_offsets_N1[n + 1]]
        ids = torch.from_numpy(tokens[:-1].astype(np.int64))[None]
        with torch.no_grad():
            weights = model(ids, output_attentions=True).attentions[-1][0].mean(0).numpy()
        found = np.take_along_axis(weights, np.arange(len(weights))[:, None] - distances, axis=1)[3:]
        np.testing.assert_allclose(found, -np.sort(-weights, axis=1)[3:, :3], atol=1e-5)
    column = to_arrow(cache, order, fields=["attended"])["attended"]
    assert np.array_equal(np.concatenate([np.array(row) for row in column.to_pylist()]), batch.fields["attended"])

    # Verified: as it is, and written wrongly.
    assert verify_cache(path, deep=True).problems == []
    whole = cache.read(range(len(cache)), fields=["attended"])
    field = cache.fields["attended"]
    whole.fields["attended"] = whole.fields["attended"] + 1
    assert list(field.check(whole)) == ["a distance leads out of its sequence"]

    # Transcoded: as it is stored, and some sequences.
    for name, changes in (("fewer", {"targets": {"top_k": 2}}), ("some", {"where": "num_positions >= 10"})):
        config = build(TranscodeConfig, {"source": path, "output": str(tmp_path / name), **changes})
        transcode_cache(config, progress=False)
        made = open_cache(str(tmp_path / name))
        assert verify_cache(str(tmp_path / name), deep=True).problems == []
        chosen = np.flatnonzero(cache.lengths_N >= 10) if name == "some" else np.arange(len(cache))
        assert len(made) == len(chosen)
        found, expected = (c.read(i, fields=["attended"]) for c, i in ((made, range(len(made))), (cache, chosen)))
        np.testing.assert_array_equal(found.fields["attended"], expected.fields["attended"])

    # Trained on: the term's map learns.
    run = {
        "cache": path,
        "student": {"model": str(tmp_path / "student")},
        "output": str(tmp_path / "run"),
        "objective": {"forward_kl": {"weight": 0.5}, "attended": {"weight": 0.5}},
        "max_steps": 30,
        "learning_rate": 0.01,
    }
    result = train_student(build(TrainConfig, run), progress=False)
    assert result.losses["attended"] < np.log(16)

    # Without the package, the rest of the cache can be read.
    monkeypatch.delitem(FIELD_KINDS._rows, "attended")
    FIELD_KINDS._used.pop("attended", None)
    without = open_cache(path)
    np.testing.assert_array_equal(without.read(order).targets.ids_PK, batch.targets.ids_PK)
    with pytest.raises(CacheError, match="field 'attended' is of the kind 'attended', which is not installed"):
        without.read([0], fields=["attended"])
