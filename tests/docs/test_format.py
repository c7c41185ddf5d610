import hashlib
import io
import itertools
import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow.parquet as pq
import pytest

from kdcache.cache import CacheWriter, open_cache
from kdcache.cache.shard_file import pack, unpack
from kdcache.codecs import TOPK_CODECS, VECTOR_CODECS, TopKCodec, targets_codec
from kdcache.config import build
from kdcache.corpus import SequenceConfig
from kdcache.dump import DumpConfig, dump_teacher
from kdcache.errors import CacheError, CorruptCacheError
from kdcache.fields import CLASS_LABELS, NUMBER_LABELS, SEGMENT_IDS, TOKEN_INDEX, tokens_field
from kdcache.schema import (
    ArrayRecord,
    CorpusRecord,
    FieldRecord,
    Manifest,
    ObjectRecord,
    OutputsRecord,
    Plan,
    ShardRecord,
    Statistics,
    TargetsRecord,
    TeacherRecord,
    TokenizerRecord,
)
from kdcache.verify.stored import verify_cache
from tests.docs.pages import DOCS, blocks, rows, sections
from tests.tiny import SENTENCES, bpe_tokenizer, llama

PAGE = (DOCS / "format.md").read_text()
SECTIONS = sections(PAGE)
RECORDS = [
    Plan,
    ShardRecord,
    ObjectRecord,
    Statistics,
    FieldRecord,
    ArrayRecord,
    TargetsRecord,
    OutputsRecord,
    TeacherRecord,
    TokenizerRecord,
    CorpusRecord,
]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("teacher")
    tokenizer = bpe_tokenizer()
    llama(len(tokenizer)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    lines = [
        json.dumps({"text": " ".join([sentence] * (1 + n % 3)), "teacher_loss": n, "source": "made up"})
        for n, sentence in enumerate(SENTENCES * 3)
    ]
    (path / "texts.jsonl").write_text("\n".join(lines))
    return path


def dump(teacher: Path, output: Path, **changes: Any) -> Path:
    settings = {
        "output": str(output),
        "teacher": {"model": str(teacher)},
        "corpus": {"paths": [str(teacher / "texts.jsonl")]},
        "sequences": {"max_length": 32},
        "targets": {"top_k": 8},
        "shard_positions": 250,
        **changes,
    }
    dump_teacher(build(DumpConfig, settings), progress=False)
    return output


@pytest.fixture(scope="module")
def cache(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dump(teacher, tmp_path_factory.mktemp("cache") / "cache")


@pytest.fixture(scope="module")
def packed(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = {"sequences": {"max_length": 32, "packing": "window"}, "hidden_states": {"layers": "1,last"}}
    return dump(teacher, tmp_path_factory.mktemp("packed") / "cache", **settings)


def reference_decoder() -> Any:
    found = blocks(PAGE, "python")
    assert len(found) == 1
    assert "kdcache" not in found[0]
    assert found[0].count("\n") <= 40
    assert "of 40 lines" in PAGE
    namespace: dict[str, Any] = {}
    exec(compile(found[0], "docs/format.md", "exec"), namespace)
    return namespace["decode_cache"]


#: Caches for the reference decoder beside the usual ones: coarse grids make many ids tie.
DECODED: dict[str, dict[str, Any]] = {
    "grid": {"top_k": 3, "codec": {"name": "compact", "grid": 5, "scalar_dtype": "float32"}},
    "ties": {"top_k": 40, "codec": {"name": "compact", "grid": 2}},
    "min_prob": {"top_k": 40, "min_prob": 0.01},
    "min_mass": {"top_k": 40, "min_mass": 0.5, "codec": {"name": "compact", "grid": 2}},
    "one": {"top_k": 1},
    "hidden": {"kind": "hidden"},
}


@pytest.mark.parametrize("kind", ["cache", "packed", *DECODED])
def test_reference_decoder_agrees_with_the_reader(
    kind: str, teacher: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if kind in DECODED:
        path = dump(teacher, tmp_path / "cache", targets=DECODED[kind])
    else:
        path = request.getfixturevalue(kind)
    opened = open_cache(str(path))
    assert opened.manifest.num_shards > 1
    decoded = list(reference_decoder()(path))
    assert len(decoded) == len(opened)
    for index, (sequence_id, tokens, ids, logprobs, log_tail) in enumerate(decoded):
        expected = opened.read([index])
        assert sequence_id == opened.metadata(index)["sequence_id"]
        np.testing.assert_array_equal(tokens, expected.tokens_T)
        np.testing.assert_array_equal(ids, expected.targets.ids_PK)
        np.testing.assert_array_equal(log_tail, expected.targets.log_tail_P)
        np.testing.assert_allclose(logprobs, expected.targets.logprobs_PK, rtol=1e-6, atol=1e-6)
        assert len(tokens) == len(ids) + 1


@pytest.mark.parametrize(("targets", "words"), [({"codec": "exact"}, "exact"), ({"kind": "hybrid"}, "or samples")])
def test_reference_decoder_refuses_what_it_cannot_read(
    teacher: Path, tmp_path: Path, targets: dict[str, Any], words: str
) -> None:
    path = dump(teacher, tmp_path / "cache", targets=targets)
    with pytest.raises(ValueError, match=words):
        list(reference_decoder()(path))


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.__name__)
def test_page_lists_the_members_of_every_record(record: type[Any]) -> None:
    documented = rows(SECTIONS[record.__name__])
    assert list(documented) == list(record.model_fields)
    for name, field in record.model_fields.items():
        text = " ".join(documented[name])
        assert field.is_required() == ("default" not in text) or name == "format_version", name
        assert ("may be null" in text) == (type(None) in get_args(field.annotation)), name


def test_page_lists_the_members_of_the_manifest() -> None:
    more = [name for name in Manifest.model_fields if name not in Plan.model_fields]
    assert list(rows(SECTIONS["Manifest"])) == more


def test_page_lists_how_sequences_are_made() -> None:
    assert list(rows(SECTIONS["Task `causal-lm`"])) == list(SequenceConfig.model_fields)


def documented_arrays() -> dict[str, list[str]]:
    names = ("Field `tokens`", "Field `targets`", "Samples", "Fields `hidden-<layer>`")
    return {name: cells for title in names for name, cells in rows(SECTIONS[title]).items()}


TARGETS = [
    TargetsRecord(top_k=8),
    TargetsRecord(top_k=300, min_prob=0.1, temperatures=(2.0,)),
    TargetsRecord(top_k=8, min_mass=0.9),
    TargetsRecord(top_k=70_000, min_mass=0.9),
    TargetsRecord(kind="sampled", top_k=0, num_samples=50),
    TargetsRecord(kind="sampled", top_k=0, num_samples=300),
    TargetsRecord(kind="hybrid", top_k=4, num_samples=70_000),
    TargetsRecord(kind="hidden", top_k=1),
    TargetsRecord(kind="outputs", top_k=0),
]


OPTIONAL = (SEGMENT_IDS, TOKEN_INDEX, CLASS_LABELS, NUMBER_LABELS)


def stored_arrays() -> list[tuple[str, ArrayRecord]]:
    """Every array that any codec stores, for a small and a large vocabulary, with the codec's name."""
    found = []
    for vocab_size in (1000, 100_000):
        found += [("", array) for array in tokens_field(vocab_size, OPTIONAL).arrays]
        for name, record, dtype in itertools.product(TOPK_CODECS, TARGETS, ("float16", "float32")):
            codec = targets_codec({"name": name, "scalar_dtype": dtype}, record, vocab_size)
            found += [(name, array) for array in codec.arrays()]
    return found + [(name, array) for name, codec in VECTOR_CODECS.items() for array in codec().arrays(16)]


def test_page_lists_every_array() -> None:
    documented, stored = documented_arrays(), stored_arrays()
    assert set(documented) == {array.name for _, array in stored}
    for codec, array in stored:
        dtype, kind, shape, *rest = documented[array.name]
        assert array.dtype in dtype, array
        assert array.rows in kind.split(" or "), array
        assert array.shape or not shape or shape == "K or none", array
        assert shape or not array.shape, array
        if array.name.startswith(("topk_", "id_table")):
            assert codec in rest[0].split(", "), (codec, array)


@pytest.mark.parametrize("codec", [*TOPK_CODECS.values(), *VECTOR_CODECS.values()], ids=lambda codec: codec.__name__)
def test_page_names_every_codec_with_its_parameters_and_defaults(codec: type[Any]) -> None:
    name = codec().name
    text = SECTIONS["Encoding" if issubclass(codec, TopKCodec) else "Fields `hidden-<layer>`"]
    assert f"`{name}`" in text
    for parameter, value in codec().model_dump(exclude={"name"}).items():
        assert f"`{parameter}`" in text
        assert str(value) in text


@pytest.mark.parametrize("kind", ["cache", "packed"])
def test_tables_have_the_documented_columns(kind: str, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(kind)
    opened = open_cache(str(path))
    table = opened.sequence_table()
    metadata = {"corpus_teacher_loss", "source"}
    found = {field.name: str(field.type) for field in table.schema if field.name not in metadata}
    assert set(table.column_names) == metadata | set(found)
    assert found == {
        name: cells[0].replace("float32", "float") for name, cells in rows(SECTIONS["Per-sequence table"]).items()
    }
    plan = pq.read_schema(path / "plan.parquet")
    assert {field.name: str(field.type) for field in plan} == {
        name: cells[0] for name, cells in rows(SECTIONS["plan.parquet"]).items()
    }


def test_metadata_keeps_apart_from_the_statistics_of_the_same_name(cache: Path) -> None:
    opened = open_cache(str(cache))
    first = opened.metadata(0)
    assert first["corpus_teacher_loss"] == 0
    rows_of = opened.read([0])
    counts = rows_of.loss_mask_P.astype(bool)
    assert first["num_targets"] == counts.sum()
    assert first["teacher_loss"] == pytest.approx(-rows_of.targets.gold_logprob_P[counts].mean(), abs=1e-2)


def test_loss_mask_counts_every_token_but_the_first_once(cache: Path, packed: Path) -> None:
    for path in (cache, packed):
        plan = pq.read_table(path / "plan.parquet")
        ends: dict[int, int] = {}
        for row in plan.to_pylist():
            ends[row["document"]] = max(ends.get(row["document"], 0), row["token_offset"] + row["num_tokens"])
        expected = sum(end - 1 for end in ends.values())
        assert open_cache(str(path)).manifest.statistics.num_positions == expected


def test_fingerprint_is_the_hash_of_the_manifest(cache: Path) -> None:
    assert open_cache(str(cache)).fingerprint == hashlib.sha256((cache / "manifest.json").read_bytes()).hexdigest()


def test_files_are_those_of_the_directory_section(packed: Path) -> None:
    manifest = json.loads((packed / "manifest.json").read_text())
    expected = {"plan.json", "plan.parquet", "manifest.json", *(r["path"] for r in manifest["tokenizer_files"])}
    assert [record["path"] for record in manifest["cache_files"]] == ["tail_prior.zarr.zip"]
    expected |= {"tail_prior.zarr.zip"}
    for shard in manifest["shards"]:
        number, attempt = f"{shard['index']:06d}", shard["attempt"]
        expected |= {
            f"commits/{number}.json",
            f"fields/tokens/{number}-{attempt}.zarr.zip",
            f"fields/targets/{number}-{attempt}.zarr.zip",
            f"fields/hidden-1/{number}-{attempt}.zarr.zip",
            f"fields/hidden-2/{number}-{attempt}.zarr.zip",
            f"sequences/{number}-{attempt}.arrow",
        }
    found = {path.relative_to(packed).as_posix() for path in packed.rglob("*") if path.is_file()}
    assert found - {".lock"} == expected


def changed_manifest(cache: Path, target: Path, **changes: Any) -> str:
    shutil.copytree(cache, target)
    manifest = json.loads((target / "manifest.json").read_text())
    (target / "manifest.json").write_text(json.dumps({**manifest, **changes}))
    return str(target)


def test_newer_format_is_refused_as_newer_even_with_unknown_members(cache: Path, tmp_path: Path) -> None:
    path = changed_manifest(cache, tmp_path / "newer", format_version=3, compression="better")
    with pytest.raises(CacheError, match="format version 3, this kdcache reads 2; install a newer") as caught:
        open_cache(path)
    assert not isinstance(caught.value, CorruptCacheError)


def test_an_older_format_says_what_to_do(cache: Path, tmp_path: Path) -> None:
    path = changed_manifest(cache, tmp_path / "older", format_version=1)
    with pytest.raises(CacheError, match="format version 1, this kdcache reads 2; dump the cache again"):
        open_cache(path)


def test_unknown_members_are_ignored(cache: Path, tmp_path: Path) -> None:
    changed = open_cache(changed_manifest(cache, tmp_path / "odd", compression="better"))
    assert changed.manifest == open_cache(str(cache)).manifest


def test_unknown_features_are_refused_by_name(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="uses the feature 'compression', which needs a newer kdcache") as caught:
        open_cache(changed_manifest(cache, tmp_path / "newer", features=["compression"], compression="better"))
    assert not isinstance(caught.value, CorruptCacheError)


def test_a_member_that_occurs_twice_is_refused(cache: Path, tmp_path: Path) -> None:
    shutil.copytree(cache, tmp_path / "odd")
    text = (tmp_path / "odd" / "manifest.json").read_text()
    (tmp_path / "odd" / "manifest.json").write_text(text.replace('"task":', '"task": "ranking",\n "task":', 1))
    with pytest.raises(CorruptCacheError, match="the member 'task' occurs twice"):
        open_cache(str(tmp_path / "odd"))


def test_manifest_without_targets_is_refused(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(CorruptCacheError, match="targets"):
        open_cache(changed_manifest(cache, tmp_path / "odd", fields=[]))


def test_manifest_does_not_outlive_its_shards(teacher: Path, cache: Path, tmp_path: Path) -> None:
    path = tmp_path / "cache"
    shutil.copytree(cache, path)
    first = open_cache(str(path)).manifest
    (path / "commits" / "000001.json").unlink()
    seen = []

    write = CacheWriter.write_shard

    def watched(writer: CacheWriter, data: Any) -> Any:
        seen.append((path / "manifest.json").exists())
        return write(writer, data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CacheWriter, "write_shard", watched)
        dump(teacher, path)
    assert seen == [False]
    second = open_cache(str(path)).manifest
    assert verify_cache(str(path), deep=True).ok
    assert second.shards[0] == first.shards[0]
    assert second.shards[1].attempt != first.shards[1].attempt
    assert second.shards[1].objects["targets"].sha256 == first.shards[1].objects["targets"].sha256


def rewritten(change: Callable[[str, bytes], bytes]) -> bytes:
    """An object of one array, each of whose zip entries went through ``change``."""
    buffer = io.BytesIO()
    data = pack({"tokens/tokens": np.arange(5000, dtype=np.uint16)})
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w") as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return buffer.getvalue()


def unpacked(data: bytes) -> np.ndarray:
    record = ArrayRecord(name="tokens", dtype="uint16", rows="tokens")
    return unpack(data, {record.path: (record, 5000)}, "object x")["tokens/tokens"]


def test_an_object_may_be_zipped_again() -> None:
    np.testing.assert_array_equal(unpacked(rewritten(lambda name, data: data)), np.arange(5000))


def test_only_the_documented_zarr_codecs_are_opened() -> None:
    def gzip_instead(name: str, data: bytes) -> bytes:
        return data.replace(b'"blosc"', b'"gzip"') if name.endswith("zarr.json") else data

    with pytest.raises(CorruptCacheError, match=r"object x, array tokens/tokens has the codecs .*gzip"):
        unpacked(rewritten(gzip_instead))


def test_a_chunk_may_not_claim_more_bytes_than_it_has_place_for() -> None:
    def claim_a_gigabyte(name: str, data: bytes) -> bytes:
        return data[:4] + (1 << 30).to_bytes(4, "little") + data[8:] if name.endswith("c/0") else data

    with pytest.raises(CorruptCacheError, match=r"chunk 0 does not hold 10000 bytes"):
        unpacked(rewritten(claim_a_gigabyte))


def test_overlapping_zip_entries_are_refused() -> None:
    data = pack({"tokens/tokens": np.arange(5000, dtype=np.uint16)})
    buffer = io.BytesIO(data)
    with zipfile.ZipFile(buffer, "a") as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
        for number in range(50):
            again = zipfile.ZipInfo(f"again/{number}")
            again.header_offset, again.CRC = largest.header_offset, largest.CRC
            again.file_size = again.compress_size = largest.file_size
            archive.filelist.append(again)
        archive._didModify = True
    with pytest.raises(CorruptCacheError, match="overlap"):
        unpacked(buffer.getvalue())
