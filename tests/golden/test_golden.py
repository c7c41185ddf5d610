"""Caches that were committed once must open for ever and decode to the same numbers."""

import numpy as np
import pytest

from kdcache.cache import open_cache, verify
from tests.golden.make import ROOT, VARIANTS, decoded

CACHES = sorted(path.parent for path in ROOT.glob("*/decoded.npz"))


def test_every_variant_is_committed() -> None:
    assert {path.name for path in CACHES} >= set(VARIANTS)


@pytest.mark.parametrize("path", CACHES, ids=lambda path: path.name)
def test_golden_cache_decodes_as_it_did(path) -> None:
    found = decoded(open_cache(str(path / "cache")))
    with np.load(path / "decoded.npz") as expected:
        assert set(found) == set(expected.files)
        for name in expected.files:
            if expected[name].dtype.kind == "f":
                # Another numpy may round exp and log differently by a unit.
                np.testing.assert_allclose(found[name], expected[name], rtol=2e-6, atol=2e-6, err_msg=name)
            else:
                np.testing.assert_array_equal(found[name], expected[name], err_msg=name)


@pytest.mark.parametrize("path", CACHES, ids=lambda path: path.name)
def test_golden_cache_verifies(path) -> None:
    report = verify(str(path / "cache"), deep=True)
    assert report.problems == []
    assert report.num_objects > 0
