"""What the format page says of each task, held against caches that were dumped: plain NumPy over the stored arrays."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from zarr.storage import ZipStore

from kdcache.cache import open_cache
from kdcache.dump import dump_teacher
from kdcache.schema import OutputsRecord
from kdcache.tasks import TASKS, Task
from tests.docs.pages import DOCS, rows, sections
from tests.docs.test_format import reference_decoder
from tests.task_models import TINY_TASKS, dump_config

PAGE = sections((DOCS / "format.md").read_text())
TABLE = rows(PAGE["Tasks"])
#: Columns of the table, the first one not counted.
ROW, SHAPE, SEGMENTS, LABELS, PLACES, KIND, IDS, OUTPUTS = range(8)


def arrays_of(task: Task) -> dict[str, str]:
    """The arrays that a task stores of its sequences, with their types; of causal-lm as it is packed."""
    settings = task.settings()
    if task.name == "causal-lm":
        settings = settings.model_copy(update={"packing": "window"})
    return {array.name: array.dtype for array in task.arrays(settings, OutputsRecord(width=1, labels=("a", "b")))}


def test_every_task_stands_in_the_table() -> None:
    assert set(TABLE) == set(TASKS)


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
def test_the_table_says_what_a_task_stores(task: Task) -> None:
    cells, arrays = TABLE[task.name], arrays_of(task)
    assert (cells[SEGMENTS] != "no") == ("segment_ids" in arrays)
    assert cells[LABELS] == arrays.get("labels", "no")
    assert (cells[PLACES] == "yes") == ("token_index" in arrays)
    assert cells[IDS] == {"tokens": "tokens", "classes": "classes", "outputs": ""}[task.gives]
    assert (cells[OUTPUTS] == "no") == (task.gives == "tokens")
    assert (cells[KIND] == "`outputs`") == (task.gives == "outputs")


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
def test_the_page_lists_the_settings_of_a_task(task: Task) -> None:
    assert list(rows(PAGE[f"Task `{task.name}`"])) == list(task.settings.model_fields)


def stored(path: Path) -> tuple[dict[str, Any], list[dict[str, np.ndarray]]]:
    """The manifest, and the arrays of the field targets (and outputs, if there is one) of every sequence."""
    manifest = json.loads((path / "manifest.json").read_text())
    found = []
    for shard in manifest["shards"]:
        arrays = {}
        for field in manifest["fields"]:
            group = zarr.open_group(ZipStore(path / shard["objects"][field["name"]]["path"], mode="r"), mode="r")
            names = {a["name"]: f"{a['rows']}/{a['name']}" for a in field["arrays"]}
            arrays |= {"outputs" if name == "states" else name: group[place][:] for name, place in names.items()}
        found += _split(arrays)
    return manifest, found


def _split(arrays: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    ends = {rows: np.cumsum(arrays[f"num_{rows}"])[:-1] for rows in ("tokens", "positions")}
    of_tokens = ("tokens", "segment_ids")
    named = {
        name: np.split(array, ends["tokens" if name in of_tokens else "positions"])
        for name, array in arrays.items()
        if not name.startswith("num_")
    }
    return [{name: parts[n] for name, parts in named.items()} for n in range(len(arrays["num_tokens"]))]


@pytest.mark.parametrize("task", TINY_TASKS)
def test_arrays_are_as_the_table_says(task: str, task_caches: dict[str, Path]) -> None:
    manifest, sequences = stored(task_caches[task])
    cells = TABLE[task]
    assert manifest["targets"]["kind"] == ("outputs" if cells[KIND] == "`outputs`" else "top-k")
    assert (manifest["outputs"] is not None) == (cells[OUTPUTS] != "no")
    assert len(sequences) == manifest["num_sequences"]
    for arrays in sequences:
        num_rows = len(arrays["loss_mask"])
        assert arrays["loss_mask"].all()
        assert ("segment_ids" in arrays) == (cells[SEGMENTS] == "yes")
        assert ("token_index" in arrays) == (cells[PLACES] == "yes")
        assert ("labels" in arrays) == (cells[LABELS] != "no")
        if "labels" in arrays:
            assert arrays["labels"].dtype == cells[LABELS]
        if "segment_ids" in arrays:  # parts stand one after another
            assert (np.diff(arrays["segment_ids"].astype(int)) >= 0).all()
        if manifest["outputs"] is not None:
            assert arrays["outputs"].shape == (num_rows, manifest["outputs"]["width"])
        assert ("entropy" in arrays) == (manifest["targets"]["kind"] != "outputs")


def test_masked_lm(task_caches: dict[str, Path]) -> None:
    _, sequences = stored(task_caches["masked-lm"])
    texts: dict[str, set[bytes]] = {}
    ids = open_cache(str(task_caches["masked-lm"])).sequence_table(["sequence_id"])["sequence_id"].to_pylist()
    for sequence_id, arrays in zip(ids, sequences, strict=True):
        places = arrays["token_index"]
        assert len(places) >= 1
        assert (np.diff(places.astype(int)) > 0).all()
        assert 0 < places.min() <= places.max() < len(arrays["tokens"]) - 1
        text = arrays["tokens"].copy()
        text[places] = arrays["labels"]
        piece, replica = sequence_id.split("#")
        texts.setdefault(piece, set()).add(text.tobytes())
        assert replica in ("0", "1")
    assert all(len(found) == 1 for found in texts.values())  # replicas hide tokens of the same text


def test_seq2seq_lm(task_caches: dict[str, Path]) -> None:
    _, sequences = stored(task_caches["seq2seq-lm"])
    for arrays in sequences:
        target = arrays["tokens"][arrays["segment_ids"] == 1]
        assert len(target) == len(arrays["loss_mask"])
        # Everything is kept, so the label's probability stands among the kept ones.
        at = (arrays["topk_ids"] == target[:, None]) & (arrays["topk_logprobs"] > -np.inf)
        known = at.any(axis=1)
        assert known.any()
        np.testing.assert_allclose(arrays["topk_logprobs"][at], arrays["gold_logprob"][known], atol=1e-6)


def test_classes(task_caches: dict[str, Path]) -> None:
    manifest, sequences = stored(task_caches["sequence-classification"])
    names = [row["label"] for row in TINY_TASKS["sequence-classification"].rows]
    num_unlabelled = 0
    for arrays, name in zip(sequences, names, strict=True):
        [label], [gold], [outputs] = arrays["labels"], arrays["gold_logprob"], arrays["outputs"]
        assert label == (-1 if name is None else manifest["outputs"]["labels"].index(name))
        assert np.isnan(gold) == (label == -1)
        num_unlabelled += label == -1
        logprobs = outputs - np.log(np.exp(outputs).sum())
        np.testing.assert_allclose(logprobs[arrays["topk_ids"][0]], arrays["topk_logprobs"][0], atol=1e-6)
        if label != -1:
            assert gold == pytest.approx(logprobs[label], abs=1e-6)
    assert num_unlabelled == sum(shard["statistics"]["num_unlabelled"] for shard in manifest["shards"])
    loss = open_cache(str(task_caches["sequence-classification"])).sequence_table()["teacher_loss"]
    assert [value is None for value in loss.to_pylist()] == [name is None for name in names]


def test_numbers(task_caches: dict[str, Path]) -> None:
    manifest, sequences = stored(task_caches["sequence-regression"])
    labels = np.array([row["label"] for row in TINY_TASKS["sequence-regression"].rows], np.float32)
    np.testing.assert_array_equal([arrays["labels"][0] for arrays in sequences], labels)
    statistics = [shard["statistics"] for shard in manifest["shards"]]
    for sums in statistics:
        assert sums["num_unlabelled"] == sums["num_positions"] > 0
        assert not any(sums[name] for name in ("teacher_loss_sum", "entropy_sum", "kept_mass_sum", "top1_correct"))
    columns = open_cache(str(task_caches["sequence-regression"])).sequence_table().column_names
    assert "num_targets" in columns
    assert not {"teacher_loss", "teacher_entropy", "kept_mass"} & set(columns)


def test_embedding(task_caches: dict[str, Path]) -> None:
    manifest, sequences = stored(task_caches["embedding"])
    assert {len(arrays["loss_mask"]) for arrays in sequences} == {1, 2}
    for arrays in sequences:
        num_rows = len(arrays["loss_mask"])
        assert set(arrays["segment_ids"]) == set(range(num_rows))
        assert len(set(arrays["labels"])) == 1
        if manifest["outputs"]["normalised"]:
            np.testing.assert_allclose(np.linalg.norm(arrays["outputs"], axis=1), 1, atol=1e-5)


def test_ranking(task_caches: dict[str, Path]) -> None:
    _, sequences = stored(task_caches["ranking"])
    for arrays, row in zip(sequences, TINY_TASKS["ranking"].rows, strict=True):
        segments, tokens = arrays["segment_ids"], arrays["tokens"]
        assert set(segments) == set(range(2 * len(row["documents"])))
        queries = [tokens[segments == 2 * n].tobytes() for n in range(len(row["documents"]))]
        assert len(set(queries)) == 1
        assert arrays["labels"].tolist() == row["relevance"]


@pytest.mark.parametrize("task", TINY_TASKS)
def test_documents_that_were_cut_are_counted(task: str, task_caches: dict[str, Path]) -> None:
    manifest, _ = stored(task_caches[task])
    assert (manifest["corpus"]["num_truncated"] > 0) == (
        task in ("sequence-classification", "sequence-regression", "seq2seq-lm", "embedding", "ranking")
    )


@pytest.mark.parametrize("task", ["masked-lm", "seq2seq-lm"])
def test_reference_decoder_reads_other_tasks(task: str, task_caches: dict[str, Path], tmp_path: Path) -> None:
    beside = task_caches[task].parent
    found = {name: str(beside / name) for name in ("teacher", "student")} | {"corpus": str(beside / "corpus.jsonl")}
    targets = {"top_k": 5, "codec": "compact"}
    dump_teacher(dump_config(task, found, tmp_path / "cache", targets=targets), progress=False)
    opened = open_cache(str(tmp_path / "cache"))
    decoded = list(reference_decoder()(tmp_path / "cache"))
    assert len(decoded) == len(opened)
    for index, (_, tokens, ids, logprobs, log_tail) in enumerate(decoded):
        expected = opened.read([index])
        np.testing.assert_array_equal(tokens, expected.tokens_T)
        np.testing.assert_array_equal(ids, expected.targets.ids_PK)
        np.testing.assert_array_equal(log_tail, expected.targets.log_tail_P)
        np.testing.assert_allclose(logprobs, expected.targets.logprobs_PK, rtol=1e-6, atol=1e-6)


def test_reference_decoder_refuses_caches_without_distributions(task_caches: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="outputs"):
        list(reference_decoder()(task_caches["embedding"]))
