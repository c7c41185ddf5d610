"""What the format page says of each kind of targets, followed to the letter: plain loops, and no kdcache to decode."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from safetensors import safe_open
from safetensors.numpy import load_file
from zarr.storage import ZipStore

from kdcache.cache import open_cache
from kdcache.models.lm_head import head_from_bytes
from kdcache.schema import TargetsRecord
from tests.docs.pages import DOCS, sections
from tests.synthetic import SyntheticCache

PAGE = sections((DOCS / "format.md").read_text())


def write(path: Path, record: TargetsRecord, **settings: Any) -> tuple[dict[str, Any], Any]:
    """Write a cache of one shard; return its manifest as JSON and its reader's view of all of it."""
    SyntheticCache(shard_sequences=13, record=record, codec="compact", **settings).write(path)
    return json.loads((path / "manifest.json").read_text()), open_cache(str(path)).read(range(13))


def arrays_of(path: Path, manifest: dict[str, Any], field: str = "targets") -> dict[str, np.ndarray]:
    [shard], [record] = manifest["shards"], [f for f in manifest["fields"] if f["name"] == field]
    group = zarr.open_group(ZipStore(path / shard["objects"][field]["path"], mode="r"), mode="r")
    return {array["name"]: group[f"{array['rows']}/{array['name']}"][:] for array in record["arrays"]}


def by_position(entries: list[int], lengths: list[int]) -> list[list[int]]:
    """Undo "column by column": the first of every position that has one, then the second of ..."""
    rows: list[list[int]] = [[] for _ in lengths]
    left = iter(entries)
    for column in range(max(lengths, default=0)):
        for row, length in zip(rows, lengths, strict=True):
            if column < length:
                row.append(next(left))
    assert next(left, None) is None
    return rows


def table_of(steps: np.ndarray) -> list[int]:
    modulus = {"uint16": 1 << 16, "uint32": 1 << 32}[str(steps.dtype)]
    ids, current = [], 0
    for step in steps.tolist():
        current = (current + step) % modulus
        ids.append(current)
    return ids


@pytest.mark.parametrize("vocab_size", [50, 70_000])
def test_samples(tmp_path, vocab_size):
    record = TargetsRecord(kind="hybrid", top_k=2, num_samples=300)
    manifest, batch = write(tmp_path, record, vocab_size=vocab_size)
    arrays = arrays_of(tmp_path, manifest)
    lengths, table = arrays["num_sampled"].tolist(), table_of(arrays["sample_table"])
    assert manifest["shards"][0]["num_rows"]["samples"] == sum(lengths) == len(arrays["sample_ranks"])
    modulus = 1 << (16 if vocab_size == 50 else 32)
    counts, steps = (by_position(arrays[name].tolist(), lengths) for name in ("sample_counts", "sample_ranks"))
    ids, logprobs, log_tail = batch.targets.merged()
    num_steps = 0
    for row, (row_counts, row_steps) in enumerate(zip(counts, steps, strict=True)):
        ranks: list[int] = []
        for j, step in enumerate(row_steps):
            is_first = j == 0 or row_counts[j] != row_counts[j - 1]
            ranks.append(step if is_first else (step + ranks[-1]) % modulus)
            num_steps += not is_first
        assert sorted(row_counts, reverse=True) == row_counts
        assert sum(row_counts) == 300
        tail = np.exp(arrays["log_tail"].astype(float))[row]
        expected = {table[rank]: tail * count / 300 for rank, count in zip(ranks, row_counts, strict=True)}
        place = {int(i): p for i, p in zip(ids[row, 2:], np.exp(logprobs[row, 2:]), strict=True) if p > 0}
        assert place == pytest.approx(expected, rel=1e-5)
        assert log_tail[row] == -np.inf
    assert num_steps > 50


def test_kept_ids_of_ragged_rows(tmp_path):
    record = TargetsRecord(top_k=30, min_prob=0.001, temperatures=(0.5, 2.0))
    manifest, batch = write(tmp_path, record)
    arrays = arrays_of(tmp_path, manifest)
    lengths, table = arrays["num_kept"].tolist(), table_of(arrays["id_table"])
    assert manifest["shards"][0]["num_rows"]["entries"] == sum(lengths)
    assert min(lengths) < max(lengths)
    gaps, steps = (by_position(arrays[name].tolist(), lengths) for name in ("topk_gaps", "topk_ranks"))
    ties = 0
    for row, (row_gaps, row_steps) in enumerate(zip(gaps, steps, strict=True)):
        ranks: list[int] = []
        for k, step in enumerate(row_steps):
            alone = k < 2 or row_gaps[k] > 0
            ranks.append(step if alone else (step + ranks[-1]) % (1 << 16))
            ties += not alone
        head = -np.cumsum(row_gaps) / 16
        tail = min(np.exp(float(arrays["log_tail"][row])), 1 - 2**-23)
        logprobs = head + np.log1p(-tail) - np.log(np.exp(head).sum())
        assert [table[rank] for rank in ranks] == batch.targets.ids_PK[row, : lengths[row]].tolist()
        np.testing.assert_allclose(logprobs, batch.targets.logprobs_PK[row, : lengths[row]], atol=1e-5)
        # At another temperature the kept ids share what the tail leaves.
        for g, temperature in enumerate((0.5, 2.0)):
            tempered = np.exp(logprobs / temperature)
            found = (1 - np.exp(float(arrays["log_tails"][row, g]))) * tempered / tempered.sum()
            assert found.sum() + np.exp(float(batch.targets.log_tails_PG[row, g])) == pytest.approx(1, abs=1e-6)
    assert ties > 20


def test_sampled_rows_have_no_kept_ids_and_no_tail(tmp_path):
    manifest, batch = write(tmp_path, TargetsRecord(kind="sampled", top_k=0, num_samples=20))
    assert not {"log_tail", "topk_ranks", "id_table"} & set(arrays_of(tmp_path, manifest))
    assert batch.targets.ids_PK.shape[1] == 0
    assert not batch.targets.log_tail_P.any()


def test_tail_prior(tmp_path):
    SyntheticCache(record=TargetsRecord(top_k=4, tail_prior=True)).write(tmp_path)
    group = zarr.open_group(ZipStore(tmp_path / "tail_prior.zarr.zip", mode="r"), mode="r")
    found = {name: group[f"table/{name}"] for name in ("probability", "shards", "num_positions")}
    for name, array in found.items():
        assert f"`{name}` ({array.dtype}" in PAGE["Tail prior"].replace("\n", " ")
    cache = open_cache(str(tmp_path))
    assert found["shards"][:].tolist() == list(range(4))
    assert found["num_positions"][:].tolist() == [shard.num_positions for shard in cache.manifest.shards]
    np.testing.assert_array_equal(found["probability"][:], cache.tail_prior_V)


def test_states_of_int8_and_the_lm_head(tmp_path):
    manifest, batch = write(tmp_path, TargetsRecord(kind="hidden", top_k=1), hidden_codec="int8")
    arrays = arrays_of(tmp_path, manifest, f"hidden-{manifest['teacher']['num_layers']}")
    states = arrays["states"] * arrays["channel_scale"] * arrays["token_scale"][:, None]
    np.testing.assert_allclose(states, batch.hidden["last"], rtol=1e-6)
    tensors = load_file(tmp_path / "lm_head.safetensors")
    assert {name: tensor.shape for name, tensor in tensors.items()} == {"weight": (50, 6), "bias": (50,)}
    with safe_open(tmp_path / "lm_head.safetensors", "numpy") as file:
        metadata = file.metadata()
    assert set(metadata) == {"lm_head"}
    settings = json.loads(metadata["lm_head"])
    inner = settings["scale"] * (states @ tensors["weight"].T + tensors["bias"])
    logits = settings["softcap"] * np.tanh(inner / settings["softcap"])
    head = head_from_bytes((tmp_path / "lm_head.safetensors").read_bytes())
    expected = head.logits(torch.from_numpy(batch.hidden["last"])).numpy()
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)
