import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch

from kdcache.cache.curriculum import PACINGS
from kdcache.cli import COMMANDS
from kdcache.codecs import TOPK_CODECS, VECTOR_CODECS, TargetsCodec
from kdcache.corpus.sources import FORMATS
from kdcache.losses import LOSSES, MEASURES, SCHEDULES, TERMS, ChunkView, Loss, TeacherContext, incompatibility
from kdcache.models.bodies import BODIES
from kdcache.plugins import Table
from kdcache.presets import PRESETS
from kdcache.schema import Kind, TargetsRecord
from kdcache.students.sizes import SIZES
from kdcache.tasks import TASKS
from tests.contracts.matching import check_merged
from tests.docs.pages import DOCS, ROOT, blocks, sections
from tests.synthetic import random_targets
from tests.task_models import SENTENCES, bert, bert_tokenizer

PAGE = (DOCS / "extending.md").read_text()
TABLES = {
    "LOSSES": LOSSES,
    "TERMS": TERMS,
    "SCHEDULES": SCHEDULES,
    "MEASURES": MEASURES,
    "PACINGS": PACINGS,
    "TOPK_CODECS": TOPK_CODECS,
    "VECTOR_CODECS": VECTOR_CODECS,
    "TASKS": TASKS,
    "BODIES": BODIES,
    "FORMATS": FORMATS,
    "SIZES": SIZES,
    "PRESETS": PRESETS,
    "COMMANDS": COMMANDS,
}


@pytest.fixture(scope="module")
def namespace() -> dict[str, Any]:
    whole_files = titled_blocks(PAGE).values()
    found = [block for block in blocks(PAGE, "python") if block not in whole_files]
    assert len(found) == 4
    # Classes made by exec need a module whose annotations pydantic can look up.
    names: dict[str, Any] = {"__name__": __name__}
    for block in found:
        exec(compile(block, "docs/extending.md", "exec"), names)
    return names


def test_loss_of_the_page_is_the_squared_hellinger_distance(namespace: dict[str, Any]) -> None:
    loss, logprobs, teacher = (namespace[name] for name in ("loss", "teacher_logprobs", "teacher"))
    assert isinstance(loss, Loss)
    student = torch.randn(logprobs.shape).log_softmax(-1)

    def buckets(logprobs_PV: torch.Tensor) -> torch.Tensor:
        head = logprobs_PV.exp().gather(1, teacher.ids_PK)
        return torch.cat([head, 1 - head.sum(1, keepdim=True)], 1)

    expected = (buckets(student).sqrt() - buckets(logprobs).sqrt()).square().sum(1) / 2
    torch.testing.assert_close(loss.values(ChunkView(student, teacher)), expected, rtol=1e-4, atol=1e-6)


def test_codec_of_the_page_decodes_any_slice(namespace: dict[str, Any]) -> None:
    whole, codec, encoded, decoded = (namespace[name] for name in ("whole", "codec", "encoded", "decoded"))
    part = whole.decode({name: values[1:3] for name, values in encoded.items()})
    assert (part.logprobs_PK == decoded.logprobs_PK[1:3]).all()
    assert codec.model_dump() == {"name": "one-byte", "grid": 16, "scalar_dtype": "float16"}


@pytest.mark.parametrize(
    "record",
    [
        TargetsRecord(top_k=6, min_prob=0.05),
        TargetsRecord(top_k=6, min_mass=0.6, temperatures=(2.0,)),
        TargetsRecord(kind="hybrid", top_k=3, num_samples=9),
        TargetsRecord(kind="hidden", top_k=1),
    ],
    ids=lambda record: record.kind,
)
def test_codec_of_the_page_stores_every_kind_of_targets(namespace: dict[str, Any], record: TargetsRecord) -> None:
    targets = random_targets(30, record, 40)
    codec = namespace["OneByteCodec"](grid=16)
    whole = TargetsCodec(codec, record, 40)
    decoded = whole.decode(whole.open(whole.encode(targets)))
    kept = targets.logprobs_PK > -np.inf
    np.testing.assert_array_equal(decoded.ids_PK, targets.ids_PK)
    np.testing.assert_array_equal(decoded.logprobs_PK > -np.inf, kept)
    # What is more than 255 steps below 0 is cut.
    near = kept & (targets.logprobs_PK > -15)
    assert np.abs(decoded.logprobs_PK[near] - targets.logprobs_PK[near]).max() <= 1 / codec.grid
    check_merged(decoded)
    found = np.where(kept, decoded.logprobs_PK, 0)
    cost = (np.exp(targets.logprobs_PK) * (np.where(kept, targets.logprobs_PK, 0) - found)).sum(axis=1)
    assert cost.mean() < codec.kl_bound


def test_loss_of_the_page_is_refused_where_draws_stand_for_the_tail(namespace: dict[str, Any]) -> None:
    loss = namespace["loss"]
    for kind in get_args(Kind):
        refusal = incompatibility(loss, TeacherContext(kind=kind))
        assert (refusal is None) is (kind in ("top-k", "hidden"))


def test_examples_leave_the_tables_alone(namespace: dict[str, Any]) -> None:
    assert "hellinger" not in LOSSES
    assert "one-byte" not in TOPK_CODECS


def test_tables_are_where_the_page_says() -> None:
    listed = {}
    for line in sections(PAGE)["Extending kdcache"].splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and " in `kdcache/" in cells[1] and cells[0] != "teacher backend":
            name, path = (part.strip("`") for part in cells[1].split(" in "))
            listed[name] = path
    assert set(listed) == set(TABLES)
    for name, path in listed.items():
        source = (ROOT / path).read_text()
        assert f"\n{name} = " in source or f"\n{name}: " in source, path


def test_page_shows_the_row_of_its_loss_as_the_table_has_them() -> None:
    (shown,) = re.findall(r'^    "(\w+)": "([\w.]+):(\w+)",$', PAGE, re.MULTILINE)
    name, module, attribute = shown
    assert (name, attribute) == ("hellinger", "Hellinger")
    assert name not in LOSSES
    assert any(f"{kind.__module__}" == module for kind in LOSSES.values())
    source = (ROOT / "kdcache/losses/registry.py").read_text()
    assert f'"{LOSSES["forward_kl"].__module__}:ForwardKL",' in source


def test_page_lists_the_groups_of_entry_points() -> None:
    listed = re.findall(r"^\| `(kdcache\.\w+)` \|", PAGE, re.MULTILINE)
    assert {table.group for table in TABLES.values() if isinstance(table, Table)} <= set(listed)
    assert len(listed) == len(set(listed))


def test_names_that_the_prose_relies_on_exist() -> None:
    from kdcache.schema import TeacherRecord
    from kdcache.tasks import Task
    from kdcache.teachers import Teacher

    assert all(codec().kl_bound > 0 for codec in TOPK_CODECS.values())
    assert hasattr(Teacher, "answer")
    assert "backend" in TeacherRecord.model_fields
    assert all(callable(getattr(Task, name)) for name in ("plan", "arrays", "labels", "pad_batch", "collate"))


@pytest.mark.slow
def test_task_and_loss_of_the_page_work_from_a_package_of_their_own(tmp_path: Path) -> None:
    package = tmp_path / "package"
    (package / "toy-1.0.dist-info").mkdir(parents=True)
    files = titled_blocks(PAGE)
    assert set(files) == {"token_classification.py", "hellinger.py"}
    for name, text in files.items():
        (package / name).write_text(text)
    (package / "toy-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n")
    (package / "toy-1.0.dist-info" / "entry_points.txt").write_text(entry_points_of_the_page())
    classes = {"id2label": {0: "NOUN", 1: "VERB", 2: "OTHER"}, "label2id": {"NOUN": 0, "VERB": 1, "OTHER": 2}}
    for name, seed in (("teacher", 1), ("student", 2)):
        bert("BertForTokenClassification", seed=seed, num_labels=3, **classes).save_pretrained(tmp_path / name)
        bert_tokenizer().save_pretrained(tmp_path / name)
    rows = [{"text": text, "labels": ["OTHER", "NOUN", *["VERB"] * (len(text.split()) - 2)]} for text in SENTENCES]
    (tmp_path / "tagged.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(*arguments: str) -> str:
        environment = {**os.environ, "PYTHONPATH": str(package), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "kdcache", *arguments]
        found = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert found.returncode == 0, found.stderr
        return found.stdout

    dump = ["dump-teacher", "-q", "--task", "token-classification", "--teacher", "teacher", "--corpus", "tagged.jsonl"]
    run(*dump, "--max-length", "32", "--output", "cache")
    run("verify", "-q", "--deep", "cache")
    train = ["train-student", "-q", "--cache", "cache", "--student", "student", "--set", "max_steps=60"]
    run(*train, "--output", "run", "--set", "objective.hellinger.weight=1", "--set", "learning_rate=0.01")
    table = json.loads(run("evaluate", "-q", "--json", "--cache", "cache", "--student", "student", "--student", "run"))
    before, after = table["students"]
    assert table["num_targets"] == sum(len(text.split()) for text in SENTENCES)
    assert after["kl"] < 0.2 * before["kl"]
    assert after["agreement"] > 0.9
    # Its own metric: of the teacher, and of a student that has come close to it.
    assert 0 <= table["teacher"]["metrics"]["all_right"] <= 1
    assert set(after["metrics"]) == {"macro_f1", "all_right"}
    # Its own view.
    shown = json.loads(run("peek", "--json", "cache", "--sequence", "1"))
    assert [(word, label) for word, _, _, label in shown["words"]] == [
        (word.lower(), label) for word, label in zip(rows[1]["text"].split(), rows[1]["labels"], strict=True)
    ]
    assert run("peek", "cache", "--sequence", "1").count("  label ") == len(shown["words"])


def titled_blocks(page: str) -> dict[str, str]:
    """The blocks of a page that are whole files, by their names."""
    return dict(re.findall(r'```python title="([^"]+)"\n(.*?)```', page, re.DOTALL))


def entry_points_of_the_page() -> str:
    """The entry points as the page shows them, in the form in which an installed package has them."""
    shown = re.findall(r'    \[project\.entry-points\."([^"]+)"\]\n    (\S+) = "([^"]+)"', PAGE)
    assert len(shown) == 2
    return "".join(f"[{group}]\n{name} = {place}\n" for group, name, place in shown)
