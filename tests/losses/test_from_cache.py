"""What a cache says once for all of its rows, also when its LM head comes from a stranger."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from kdcache.cache import layout, open_cache
from kdcache.errors import CorruptCacheError
from kdcache.losses import LOSSES, ChunkView, TeacherRows
from kdcache.losses.from_cache import context_of
from kdcache.schema import TargetsRecord
from kdcache.torch_data import to_tensors
from kdcache.transcode import TranscodeConfig, transcode_cache
from tests.synthetic import WIDTH, SyntheticCache

NONE = {"scale": 1.0, "softcap": None}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    path = tmp_path_factory.mktemp("hidden") / "cache"
    SyntheticCache(record=TargetsRecord(kind="hidden", top_k=1)).write(path)
    return path


@pytest.fixture
def with_head(written, tmp_path):
    """Replace the LM head of a cache, and make the manifest agree with it."""

    def replace(tensors: dict[str, torch.Tensor], settings: dict = NONE) -> Path:
        path = Path(shutil.copytree(written, tmp_path / "copy"))
        data = save(tensors, metadata={"lm_head": json.dumps(settings)})
        (path / "lm_head.safetensors").write_bytes(data)
        manifest = json.loads((path / "manifest.json").read_text())
        del manifest["checksum"]
        manifest["cache_files"][0].update(num_bytes=len(data), sha256=layout.sha256(data))
        (path / "manifest.json").write_bytes(layout.canonical_json(manifest))
        return path

    return replace


@pytest.fixture(scope="module")
def weight(written):
    return torch.randn(open_cache(str(written)).vocab_size, WIDTH, generator=torch.Generator().manual_seed(0))


WRONG = {
    "too few rows": (lambda w: {"weight": w[:-1]}, NONE, "expected one row for each of the"),
    "too many rows": (lambda w: {"weight": torch.cat([w, w])}, NONE, "expected one row for each of the"),
    "too wide": (lambda w: {"weight": torch.cat([w, w], 1)}, NONE, "as wide as the last hidden states"),
    "one dimension": (lambda w: {"weight": w[:, 0].clone()}, NONE, "two dimensions"),
    "three dimensions": (lambda w: {"weight": w[:, :, None].clone()}, NONE, "two dimensions"),
    "whole numbers": (lambda w: {"weight": w.int()}, NONE, r"expected weights of F32.* found I32"),
    "truth values": (lambda w: {"weight": w > 0}, NONE, "found BOOL"),
    "eight bits": (lambda w: {"weight": w.to(torch.float8_e4m3fn)}, NONE, "found F8_E4M3"),
    "NaN": (lambda w: {"weight": w * torch.nan}, NONE, "it is not finite"),
    "bias of NaN": (lambda w: {"weight": w, "bias": w[:, 0] * torch.nan}, NONE, "it is not finite"),
    "short bias": (lambda w: {"weight": w, "bias": w[:3, 0].clone()}, NONE, r"the bias is F32 \[3\]"),
    "bias of another dtype": (lambda w: {"weight": w, "bias": w[:, 0].double()}, NONE, "the bias is F64"),
    "scale 0": (lambda w: {"weight": w}, {"scale": 0, "softcap": None}, "its scale is 0"),
    "scale NaN": (lambda w: {"weight": w}, {"scale": float("nan"), "softcap": None}, "its scale is nan"),
    "cap 0": (lambda w: {"weight": w}, {"scale": 1.0, "softcap": 0}, "its soft cap is 0"),
    "no settings": (lambda w: {"weight": w}, [], "cannot be read"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_head_that_is_none(with_head, weight, tmp_path, what):
    tensors, settings, words = WRONG[what]
    path = with_head(tensors(weight), settings)
    with pytest.raises(CorruptCacheError, match=words) as caught:
        context_of(open_cache(str(path)))
    assert str(path) in str(caught.value)
    config = TranscodeConfig(source=str(path), output=str(tmp_path / "made"), targets={"kind": "top-k", "top_k": 3})
    with pytest.raises(CorruptCacheError, match=words):
        transcode_cache(config, progress=False)


def test_a_bias_may_rule_an_id_out(with_head, weight):
    bias = torch.zeros(len(weight))
    bias[3] = -torch.inf
    head = context_of(open_cache(str(with_head({"weight": weight, "bias": bias})))).head
    assert head is not None
    assert head.logits(torch.ones(1, WIDTH))[0, 3] == -torch.inf


def test_losses_that_ignore_draws_see_the_kept_ids_of_a_hybrid_cache(tmp_path):
    record = TargetsRecord(kind="hybrid", top_k=3, num_samples=9)
    SyntheticCache(record=record).write(tmp_path / "cache")
    cache = open_cache(str(tmp_path / "cache"))
    context, stored = context_of(cache), cache.read(range(4))
    assert (context.kind, context.num_kept) == ("hybrid", 3)
    rows = TeacherRows.from_batch(to_tensors(stored, 0))
    assert rows.top_k > 3
    targets = stored.targets
    kept = replace(
        rows,
        ids_PK=torch.from_numpy(targets.ids_PK.astype("int64")),
        logprobs_PK=torch.from_numpy(targets.logprobs_PK),
        log_tail_P=torch.from_numpy(targets.log_tail_P),
    )
    logits_PV = torch.randn(rows.num_positions, cache.vocab_size, generator=torch.Generator().manual_seed(0)).double()
    for loss in (kind(weight=1.0) for kind in LOSSES.values() if kind.ignores_samples):
        found_P = loss.values(ChunkView(logits_PV, rows, context))
        torch.testing.assert_close(found_P, loss.values(ChunkView(logits_PV, kept)), rtol=1e-5, atol=1e-6)
