"""LM heads of strangers: judged without torch, by ``verify --deep`` and before every use."""

from __future__ import annotations

import json
import struct

import pytest

from kdcache.cache import layout, open_cache
from kdcache.cache.head_file import check_head
from kdcache.errors import CorruptCacheError
from kdcache.models.lm_head import head_from_bytes
from kdcache.schema import TargetsRecord
from kdcache.verify.stored import verify_cache
from tests.cache.test_stranger import change_manifest
from tests.loops import loop
from tests.synthetic import SyntheticCache

GOOD = {"scale": 1, "softcap": None}


def head(settings=GOOD, shape=(50, 6), dtype="F32", body: bytes | None = None, bias=None, **more) -> bytes:
    size = shape[0] * shape[1] * {"F32": 4, "F16": 2, "BF16": 2}.get(dtype, 1)
    tensors = {"weight": {"dtype": dtype, "shape": list(shape), "data_offsets": [0, size]}, **more}
    if bias is not None:
        tensors["bias"] = {"dtype": dtype, "shape": [len(bias)], "data_offsets": [size, size + 4 * len(bias)]}
    text = settings if isinstance(settings, str) else json.dumps(settings)
    header = json.dumps({"__metadata__": {"lm_head": text}, **tensors}).encode()
    data = bytes(min(size, 1 << 20)) if body is None else body
    return struct.pack("<Q", len(header)) + header + data + struct.pack(f"<{len(bias or [])}f", *(bias or []))


HEADS = {
    "length beyond the file": struct.pack("<Q", 2**60) + b"{}",
    "garbage": bytes(range(200)),
    "empty": b"",
    "deep": struct.pack("<Q", 100_013) + b'{"weight": ' + b"[" * 50_000 + b"]" * 50_000 + b" }",
    "deep settings": head("[" * 100_000 + "]" * 100_000),
    "a list of settings": head("[]"),
    "a scale beyond floats": head('{"scale": 1' + "0" * 400 + ', "softcap": null}'),
    "a scale of 0": head({"scale": 0, "softcap": None}),
    "a scale of text": head({"scale": "1", "softcap": None}),
    "a negative cap": head({"scale": 1, "softcap": -3}),
    "a shape beyond the file": head(shape=(10**9, 10**9), body=bytes(64)),
    "another width": head(shape=(50, 5)),
    "another vocabulary": head(shape=(49, 6)),
    "no rows": head(shape=(0, 6)),
    "eight bits": head(dtype="F8_E4M3"),
    "another tensor": head(more={"dtype": "F32", "shape": [], "data_offsets": [0, 0]}),
    "NaN": head(body=b"\0\0\xc0\x7f" * 300),
    "a bias of NaN": head(bias=[float("nan")] * 50),
    "a short bias": head(bias=[0.0] * 49),
}
#: Only the manifest says that these are wrong.
BY_MANIFEST = ("another width", "another vocabulary")


@pytest.fixture(scope="module")
def hidden(tmp_path_factory):
    path = tmp_path_factory.mktemp("head") / "cache"
    SyntheticCache(record=TargetsRecord(kind="hidden", top_k=1)).write(path)
    return path


@loop("case", list(HEADS))
def test_a_head_that_no_reader_may_use(case, hidden):
    data, manifest = HEADS[case], open_cache(str(hidden)).manifest
    with pytest.raises(CorruptCacheError, match="the teacher's LM head cannot be"):
        check_head(data, manifest)
    if case not in BY_MANIFEST:
        with pytest.raises(CorruptCacheError, match="the teacher's LM head cannot be"):
            head_from_bytes(data)


@loop("dtype", ["F32", "F16", "BF16"])
def test_sound_heads(dtype, hidden):
    check_head(head(dtype=dtype), open_cache(str(hidden)).manifest)
    assert head_from_bytes(head(dtype=dtype)).vocab_size == 50
    check_head(head(bias=[0.0, float("-inf"), *[0.0] * 48]), open_cache(str(hidden)).manifest)


def test_the_deep_pass_reads_it(hidden):
    before = (hidden / layout.LM_HEAD).read_bytes()
    assert not [p for p in verify_cache(str(hidden), deep=True, progress=False).problems if "LM head" in p]
    data = HEADS["another width"]
    (hidden / layout.LM_HEAD).write_bytes(data)
    change_manifest(hidden, lambda m: m["cache_files"][0].update(num_bytes=len(data), sha256=layout.sha256(data)))
    assert before != data
    problems = verify_cache(str(hidden), deep=True, progress=False).problems
    assert any("the teacher's LM head cannot be used: weights of the shape [50, 5]" in text for text in problems)
