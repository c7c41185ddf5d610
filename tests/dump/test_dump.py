"""The loop of a dump, driven by a fake teacher."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter

import numpy as np
import pytest

from kdcache.cache import open_cache
from kdcache.codecs import TOPK_CODECS, VECTOR_CODECS
from kdcache.corpus.record_file import RecordFile
from kdcache.corpus.text_files import TextFile
from kdcache.errors import CacheError, ConfigError, CorpusError, TeacherError
from kdcache.models.batching import batches_by_length
from kdcache.verify.stored import verify_cache
from tests.cache.test_writer import content_of, snapshot
from tests.conftest import TEXTS
from tests.dump.fake import BigramTeacher, run_dump
from tests.synthetic import targets_of

DOCUMENTS = [text.encode() for text in TEXTS if len(text.encode()) > 1]


def check_targets(path, teacher, *, atol=1e-5):
    """Every stored row is what the table of bigrams says about the token before it."""
    cache = open_cache(str(path))
    batch = cache.read(range(len(cache)))
    pieces = np.split(batch.tokens_T, batch.token_offsets_N1[1:-1])
    inputs = np.concatenate([piece[:-1] for piece in pieces])
    labels = np.concatenate([piece[1:] for piece in pieces])
    expected = targets_of(teacher.logits_VV.numpy()[inputs], labels, cache.manifest.targets)
    np.testing.assert_array_equal(batch.targets.ids_PK, expected.ids_PK)
    for name in ("logprobs_PK", "log_tail_P", "gold_logprob_P", "entropy_P", "log_tails_PG", "num_kept_P"):
        found, wanted = getattr(batch.targets, name), getattr(expected, name)
        assert (found is None) is (wanted is None), name
        if found is not None:
            np.testing.assert_allclose(found, wanted, atol=atol, err_msg=name)
    return cache, pieces


@pytest.fixture
def read_documents(monkeypatch):
    """How often the text of each document is read, by its file and row."""
    counts = Counter()
    for reader in (TextFile, RecordFile):

        def texts(self, start, stop, real=reader.texts):
            counts.update((self.name, row) for row in range(start, stop))
            return real(self, start, stop)

        monkeypatch.setattr(reader, "texts", texts)
    return counts


def test_a_dump_and_its_resumption_read_every_document_once(tmp_path, corpus_file, read_documents):
    for _ in range(2):
        read_documents.clear()
        run_dump(corpus_file, tmp_path / "cache", BigramTeacher())
        assert len(read_documents) == len(TEXTS)
        assert set(read_documents.values()) == {1}


def test_every_token_is_predicted_once_in_the_order_of_the_corpus(tmp_path, corpus_file):
    teacher = BigramTeacher()
    result = run_dump(corpus_file, tmp_path, teacher)
    cache, pieces = check_targets(tmp_path, teacher)
    texts, position = [], 0
    table = cache.sequence_table().to_pydict()
    for document_id, offset, piece in zip(table["document_id"], table["token_offset"], pieces, strict=True):
        if offset == 0:
            texts.append(bytes(piece.tolist()))
        else:
            assert texts[-1][-1] == piece[0]  # neighbours share one token
            texts[-1] += bytes(piece[1:].tolist())
        assert document_id
        position += len(piece) - 1
    assert texts == DOCUMENTS
    manifest = result.manifest
    assert manifest.num_shards == result.num_shards_written > 4
    assert manifest.num_positions == result.num_positions_written == position == sum(len(d) - 1 for d in DOCUMENTS)
    assert (manifest.corpus.num_documents, manifest.corpus.num_empty, manifest.corpus.num_too_short) == (10, 1, 1)
    assert table["source"][0] == "page 0"
    assert verify_cache(str(tmp_path), deep=True).problems == []


@pytest.mark.parametrize("batch_tokens", [1, 50, 10_000])
def test_the_batch_size_changes_nothing(tmp_path, corpus_file, batch_tokens):
    run_dump(corpus_file, tmp_path / "a", BigramTeacher(), layers=(0, 1))
    run_dump(corpus_file, tmp_path / "b", BigramTeacher(), layers=(0, 1), batch_tokens=batch_tokens)
    assert content_of(tmp_path / "a") == content_of(tmp_path / "b")


def test_hidden_states_stand_at_their_rows(tmp_path, corpus_file):
    teacher = BigramTeacher()
    run_dump(corpus_file, tmp_path, teacher, layers=(0, 1))
    cache = open_cache(str(tmp_path))
    assert cache.manifest.hidden_layers == ("hidden-0", "hidden-1")
    batch = cache.read(range(len(cache)), fields=["hidden-0", "hidden-1"])
    inputs = np.concatenate([p[:-1] for p in np.split(batch.tokens_T, batch.token_offsets_N1[1:-1])])
    for layer in (0, 1):
        np.testing.assert_array_equal(batch.hidden[f"hidden-{layer}"], teacher.states_VD.numpy()[inputs] + layer)


@pytest.mark.parametrize("codec", TOPK_CODECS)
@pytest.mark.parametrize("states", VECTOR_CODECS)
def test_every_codec_can_be_dumped(tmp_path, corpus_file, codec, states):
    settings = {"targets": {"top_k": 5, "codec": codec}, "hidden_states": {"codec": states}}
    run_dump(corpus_file, tmp_path, BigramTeacher(), layers=(1,), **settings)
    assert verify_cache(str(tmp_path), deep=True).problems == []
    fields = {field.name: field.codec["name"] for field in open_cache(str(tmp_path)).manifest.fields if field.codec}
    assert fields == {"targets": codec, "hidden-1": states}


def test_all_ids_can_be_kept(tmp_path, corpus_file):
    teacher = BigramTeacher()
    run_dump(corpus_file, tmp_path, teacher, targets={"top_k": 257, "codec": "exact"})
    cache, _ = check_targets(tmp_path, teacher)
    assert (cache.read([0]).targets.log_tail_P == -np.inf).all()
    assert verify_cache(str(tmp_path), deep=True).problems == []


def test_more_ids_than_there_are(tmp_path, corpus_file):
    with pytest.raises(ConfigError, match=r"--top-k 258 is more than the 257 ids of the tokenizer's vocabulary"):
        run_dump(corpus_file, tmp_path, BigramTeacher(), targets={"top_k": 258})


def test_packed_windows(tmp_path, corpus_file):
    teacher = BigramTeacher()
    run_dump(corpus_file, tmp_path, teacher, sequences={"max_length": 32, "packing": "window"})
    cache, pieces = check_targets(tmp_path, teacher)
    assert {len(piece) for piece in pieces[:-1]} == {33}
    batch = cache.read(range(len(cache)))
    segments = np.split(batch.segment_ids_T, batch.token_offsets_N1[1:-1])
    masks = np.split(batch.loss_mask_P, batch.position_offsets_N1[1:-1])
    for segment, mask in zip(segments, masks, strict=True):
        np.testing.assert_array_equal(mask == 0, np.diff(segment.astype(int)) != 0)
    stream = b"".join(bytes(piece[: len(piece) - 1].tolist()) for piece in pieces) + bytes([pieces[-1][-1]])
    assert stream == b"".join(DOCUMENTS)


# ------------------------------------------------------------------------------------------------------ memory


def test_batches_are_halved_until_they_fit(tmp_path, corpus_file, caplog):
    run_dump(corpus_file, tmp_path / "a", BigramTeacher())
    teacher = BigramTeacher(max_tokens=40)
    run_dump(corpus_file, tmp_path / "b", teacher, batch_tokens=1000)
    assert content_of(tmp_path / "a") == content_of(tmp_path / "b")
    # What fits is remembered: the teacher does not fail again at every batch.
    assert 0 < teacher.num_refused <= 4
    assert "out of memory at" in caplog.text


def test_a_sequence_that_does_not_fit_alone(tmp_path, corpus_file):
    with pytest.raises(TeacherError, match=r"one sequence of 16 positions does not fit .* smaller --max-length"):
        run_dump(corpus_file, tmp_path, BigramTeacher(max_tokens=15))


def test_any_other_failure_of_the_teacher_is_not_taken_for_a_lack_of_memory(tmp_path, corpus_file, monkeypatch):
    def broken(*arguments):
        raise RuntimeError("shapes do not match")

    teacher = BigramTeacher()
    monkeypatch.setattr(teacher, "run", broken)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        run_dump(corpus_file, tmp_path, teacher)


@pytest.mark.parametrize("lengths", [[5], [1, 2, 3, 4, 5], [16] * 7, [7, 100, 3, 3, 50, 1]], ids=str)
@pytest.mark.parametrize("batch_tokens", [1, 16, 33, 1000])
def test_batches_hold_every_sequence_once_within_the_budget(lengths, batch_tokens):
    lengths = np.array(lengths)
    groups = batches_by_length(lengths, batch_tokens)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    for group in groups:
        assert len(group) == 1 or len(group) * lengths[group].max() <= batch_tokens
    longest = [lengths[group].max() for group in groups]
    assert longest == sorted(longest, reverse=True)


# ------------------------------------------------------------------------------------------------------ mistakes


def test_nan_is_named_with_sequence_and_position(tmp_path, corpus_file):
    with pytest.raises(TeacherError) as caught:
        run_dump(corpus_file, tmp_path, BigramTeacher(bad_token=ord("z")))
    message = str(caught.value)
    # "freezes at zero" is in the third document; which of its sequences and positions is counted here.
    document, offset = DOCUMENTS[1], DOCUMENTS[1].index(b"z")
    before = -(-(len(DOCUMENTS[0]) - 1) // 16)
    assert f"(sequence {before + offset // 16}, position {offset % 16})" in message
    assert "NaN" in message
    assert "--dtype" in message
    assert len(document) > 16


def test_what_was_committed_before_a_failure_is_kept(tmp_path, corpus_file):
    with pytest.raises(TeacherError):
        run_dump(corpus_file, tmp_path, BigramTeacher(bad_token=ord("6") if b"6" in DOCUMENTS[-1] else ord("k")))
    kept = {name: data for name, data in snapshot(tmp_path).items() if name.startswith("commits")}
    result = run_dump(corpus_file, tmp_path, BigramTeacher())
    assert len(kept) == result.manifest.num_shards - result.num_shards_written
    assert {name: snapshot(tmp_path)[name] for name in kept} == kept


def test_a_failed_write_is_noticed_at_the_next_batch(tmp_path, corpus_file, monkeypatch):
    failed = threading.Event()

    def full(writer, data):
        failed.set()
        raise OSError(28, "No space left on device")

    class Counting(BigramTeacher):
        after = 0

        def run(self, sequences, layers=()):
            if failed.is_set():
                time.sleep(0.2)  # the writer's thread gets its turn to hand the error over
                self.after += 1
            return super().run(sequences, layers)

    monkeypatch.setattr("kdcache.cache.writer.CacheWriter.write_shard", full)
    teacher = Counting()
    with pytest.raises(OSError, match="No space left"):
        run_dump(corpus_file, tmp_path, teacher, batch_tokens=16)
    # One batch may have been under way and another one have begun; a shard has about six.
    assert 1 <= teacher.after <= 2


def test_infinite_hidden_states_are_refused(tmp_path, corpus_file):
    teacher = BigramTeacher()
    teacher.states_VD[ord("z"), 3] = np.inf
    with pytest.raises(TeacherError, match=r"hidden-1 .*NaN or infinite.*sequence \d+, position \d+"):
        run_dump(corpus_file, tmp_path, teacher, layers=(1,))


def test_nothing_to_predict(tmp_path):
    corpus = tmp_path / "short.jsonl"
    corpus.write_text('{"text": ""}\n{"text": "a"}\n')
    with pytest.raises(CorpusError, match="1 are empty and 1 have a single token; at least one needs two"):
        run_dump(corpus, tmp_path / "out", BigramTeacher())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sequences": {"max_length": 8}}, "sequences.max_length is 16 there and 8 here"),
        ({"targets": {"top_k": 4, "codec": "exact"}}, "fields"),
        ({"targets": {"top_k": 5, "codec": "compact"}}, "fields"),
        ({"shard_positions": 50}, "num_shards"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_settings_on_the_same_output(tmp_path, corpus_file, changes, words):
    run_dump(corpus_file, tmp_path, BigramTeacher())
    before = snapshot(tmp_path)
    with pytest.raises(CacheError, match=f"holds another cache: .*{words}"):
        run_dump(corpus_file, tmp_path, BigramTeacher(), **changes)
    assert snapshot(tmp_path) == before


def test_a_changed_text_is_another_corpus(tmp_path, corpus_file):
    changed = tmp_path / "texts.jsonl"
    rows = [json.loads(line) for line in corpus_file.read_text().splitlines()]
    changed.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_dump(changed, tmp_path / "out", BigramTeacher())
    rows[0]["text"] = rows[0]["text"].replace("cat", "rat")
    changed.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(CacheError, match=r"holds another cache: .*corpus\.fingerprint"):
        run_dump(changed, tmp_path / "out", BigramTeacher())


def test_running_again_writes_nothing(tmp_path, corpus_file):
    run_dump(corpus_file, tmp_path, BigramTeacher())
    before = snapshot(tmp_path)
    teacher = BigramTeacher()
    result = run_dump(corpus_file, tmp_path, teacher)
    assert (result.num_shards_written, result.num_positions_written, teacher.batches) == (0, 0, [])
    assert snapshot(tmp_path) == before


def test_to_a_store_that_is_no_disk(tmp_path, corpus_file):
    run_dump(corpus_file, tmp_path, BigramTeacher())
    run_dump(corpus_file, "memory://dumped/cache", BigramTeacher())
    assert content_of("memory://dumped/cache") == content_of(tmp_path)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (RuntimeError, "CUDA error: out of memory"),
        (RuntimeError, "MPS backend out of memory (MPS allocated: 9 GB)"),
        (RuntimeError, "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
        (RuntimeError, "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        (MemoryError, ""),
    ],
)
def test_every_way_of_running_out_of_memory_halves_the_batch(tmp_path, corpus_file, kind, message):
    class Small(BigramTeacher):
        def run(self, sequences, layers=()):
            if len(sequences) > 1:
                raise kind(message)
            return super().run(sequences, layers)

    teacher = Small()
    run_dump(corpus_file, tmp_path / "cache", teacher)
    check_targets(tmp_path / "cache", teacher)
