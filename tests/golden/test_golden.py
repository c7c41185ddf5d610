"""Caches that were committed once must open for ever and decode to the same numbers."""

import numpy as np
import pytest
import torch

from kdcache.cache import open_cache
from kdcache.codecs import TOPK_CODECS
from kdcache.fields import FIELD_KINDS
from kdcache.models.lm_head import head_from_bytes
from kdcache.schema import FORMAT_VERSION, KINDS, SCALARS
from kdcache.verify.stored import verify_cache
from tests.golden.make import ROOT, VARIANTS, decoded

CACHES = sorted(path.parent for path in ROOT.glob("*/decoded.npz"))


def test_every_variant_is_committed() -> None:
    assert {path.name for path in CACHES} >= {f"v{FORMAT_VERSION}-{name}" for name in VARIANTS}


def test_variants_cover_every_codec_and_every_kind_of_targets() -> None:
    caches = [open_cache(str(path / "cache")).manifest for path in CACHES]
    fields = [field for manifest in caches for field in manifest.fields]
    assert {field.codec["name"] for field in fields if field.name == "targets"} == set(TOPK_CODECS)
    assert {field.codec.get("name") for field in fields} >= {"exact", "int8"}
    assert {manifest.targets.kind for manifest in caches} == set(KINDS)
    arrays = {(array.name, array.dtype) for field in fields for array in field.arrays if field.name == "tokens"}
    assert {("labels", "int32"), ("labels", "float32"), ("token_index", "uint32"), ("segment_ids", "uint16")} <= arrays
    rows = {array.rows for field in fields for array in field.arrays}
    assert rows == {"sequences", "tokens", "positions", "entries", "samples", "table"}
    assert {field.kind for field in fields} == set(FIELD_KINDS.own)
    vectors = {(array.rows, len(array.shape)) for field in fields if field.kind == "vectors" for array in field.arrays}
    assert vectors >= {("positions", 1), ("tokens", 2)}
    assert {manifest.targets.tail for manifest in caches} == {"exact", "remainder"}
    assert {manifest.targets.probabilities for manifest in caches} == {"vocabulary", "kept"}
    assert {frozenset(manifest.targets.scalars) for manifest in caches} >= {frozenset({"log_tail"}), frozenset(SCALARS)}
    for has in (lambda t: t.is_ragged, lambda t: t.temperatures, lambda t: t.tail_prior):
        assert any(has(manifest.targets) for manifest in caches)


def test_golden_lm_head_opens() -> None:
    [path] = [path for path in CACHES if path.name == "v2-hidden-int8"]
    cache = open_cache(str(path / "cache"))
    head = head_from_bytes(cache.lm_head_file())
    states = torch.from_numpy(cache.read([0]).hidden["last"])
    assert head.logits(states).shape == (len(states), cache.vocab_size)
    assert (head.scale, head.softcap) == (0.5, 30.0)


@pytest.mark.parametrize("path", CACHES, ids=lambda path: path.name)
def test_golden_cache_decodes_as_it_did(path) -> None:
    found = decoded(open_cache(str(path / "cache")))
    with np.load(path / "decoded.npz") as expected:
        assert set(found) == set(expected.files)
        for name in expected.files:
            if name == "samples_ids_PJ":
                # Where an id was drawn no times, it stands for nothing.
                was_drawn = expected["samples_counts_PJ"] > 0
                np.testing.assert_array_equal(found[name][was_drawn], expected[name][was_drawn], err_msg=name)
                continue
            if expected[name].dtype.kind == "f":
                # Another numpy may round exp and log differently by a unit.
                np.testing.assert_allclose(found[name], expected[name], rtol=2e-6, atol=2e-6, err_msg=name)
            else:
                np.testing.assert_array_equal(found[name], expected[name], err_msg=name)


@pytest.mark.parametrize("path", CACHES, ids=lambda path: path.name)
def test_golden_cache_verifies(path) -> None:
    report = verify_cache(str(path / "cache"), deep=True)
    assert report.problems == []
    assert report.num_objects > 0
