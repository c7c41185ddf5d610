import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import EntryPoint
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch

from kdcache.cache import open_cache
from kdcache.cache.curriculum import PACINGS
from kdcache.cli import COMMANDS
from kdcache.codecs import TOPK_CODECS, VECTOR_CODECS, TargetsCodec
from kdcache.config import build, merge, parse_assignments
from kdcache.corpus.sources import FORMATS
from kdcache.dump import DumpConfig, dump_teacher, preview_dump
from kdcache.errors import CacheError, ConfigError, TeacherError
from kdcache.estimate import estimate_presets
from kdcache.evaluate import evaluate_students
from kdcache.fields import FIELD_KINDS
from kdcache.inspect import inspect_cache
from kdcache.losses import LOSSES, MEASURES, SCHEDULES, TERMS, ChunkView, Loss, TeacherContext, incompatibility
from kdcache.losses.from_cache import context_of
from kdcache.models.bodies import BODIES
from kdcache.peek import PeekResult, peek_cache
from kdcache.plugins import Table
from kdcache.presets import PRESETS
from kdcache.schema import Kind, TargetsRecord
from kdcache.students.sizes import SIZES
from kdcache.tasks import TASKS
from kdcache.teachers import BACKENDS
from kdcache.train import TrainConfig, preview_training, train_student
from kdcache.verify.against_teacher import verify_against_teacher
from kdcache.verify.stored import verify_cache
from tests.cli.conftest import Run, run
from tests.conftest import TEXTS
from tests.contracts.matching import check_merged
from tests.docs.pages import DOCS, ROOT, blocks, sections
from tests.synthetic import random_targets
from tests.task_models import SENTENCES, bert, bert_tokenizer
from tests.tiny import bpe_tokenizer, llama

__all__ = ["run"]

PAGE = (DOCS / "extending.md").read_text()
TABLES = {
    "LOSSES": LOSSES,
    "TERMS": TERMS,
    "SCHEDULES": SCHEDULES,
    "MEASURES": MEASURES,
    "PACINGS": PACINGS,
    "TOPK_CODECS": TOPK_CODECS,
    "VECTOR_CODECS": VECTOR_CODECS,
    "FIELD_KINDS": FIELD_KINDS,
    "TASKS": TASKS,
    "BODIES": BODIES,
    "BACKENDS": BACKENDS,
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
        if line.startswith("|") and " in `kdcache/" in cells[1]:
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


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The files of the page, as a package that is installed."""
    package = tmp_path / "package"
    (package / "toy-1.0.dist-info").mkdir(parents=True)
    files = titled_blocks(PAGE)
    assert {"token_classification.py", "hellinger.py"} <= set(files)
    for name, text in files.items():
        (package / name).write_text(text)
    (package / "toy-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n")
    (package / "toy-1.0.dist-info" / "entry_points.txt").write_text(entry_points_of_the_page())
    import_module("kdcache.cli.dump_teacher")  # whose choices are made at import, for later tests without the package
    import_module("kdcache.cli.transcode")
    monkeypatch.syspath_prepend(package)
    tables = [table for table in TABLES.values() if isinstance(table, Table)]
    for table in tables:
        monkeypatch.delitem(vars(table), "_plugins", raising=False)
        monkeypatch.setattr(table, "_used", dict(table._used))
    yield package
    for table in tables:
        vars(table).pop("_plugins", None)  # read anew, without the package
    for name in files:
        sys.modules.pop(name.removesuffix(".py"), None)


def test_task_and_loss_of_the_page_work_from_a_package_of_their_own(
    tmp_path: Path, package: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    classes = {"id2label": {0: "NOUN", 1: "VERB", 2: "OTHER"}, "label2id": {"NOUN": 0, "VERB": 1, "OTHER": 2}}
    for name, seed in (("teacher", 1), ("student", 2)):
        bert("BertForTokenClassification", seed=seed, num_labels=3, **classes).save_pretrained(tmp_path / name)
        bert_tokenizer().save_pretrained(tmp_path / name)
    rows = [{"text": text, "labels": ["OTHER", "NOUN", *["VERB"] * (len(text.split()) - 2)]} for text in SENTENCES]
    (tmp_path / "tagged.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def output(*arguments: str) -> str:
        found = run(*arguments)
        assert found.code == 0, found.err
        return found.out

    # The choices of --task are those of the process; this one may have read them before there was the package.
    dump = ["dump-teacher", "-q", "--set", "task=token-classification", "--teacher", "teacher"]
    output(*dump, "--corpus", "tagged.jsonl", "--set", "sequences.max_length=32", "--output", "cache")
    output("verify", "-q", "--deep", "cache")
    train = ["train-student", "-q", "--cache", "cache", "--student", "student", "--set", "max_steps=60"]
    output(*train, "--output", "run", "--set", "objective.hellinger.weight=1", "--set", "learning_rate=0.01")
    scored = output("evaluate", "-q", "--json", "--cache", "cache", "--student", "student", "--student", "run")
    table = json.loads(scored)
    before, after = table["students"]
    assert table["num_targets"] == sum(len(text.split()) for text in SENTENCES)
    assert after["kl"] < 0.2 * before["kl"]
    assert after["agreement"] > 0.9
    # Its own metric: of the teacher, and of a student that has come close to it.
    assert 0 <= table["teacher"]["metrics"]["all_right"] <= 1
    assert set(after["metrics"]) == {"macro_f1", "all_right"}
    # Its own view.
    shown = json.loads(output("peek", "--json", "cache", "--sequence", "1"))
    assert [(word, label) for word, _, _, label in shown["words"]] == [
        (word.lower(), label) for word, label in zip(rows[1]["text"].split(), rows[1]["labels"], strict=True)
    ]
    assert output("peek", "cache", "--sequence", "1").count("  label ") == len(shown["words"])


def test_the_command_line_knows_the_task_of_a_package(package: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": f"{package}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-m", "kdcache", "dump-teacher", "--task", "token-classificatio"]
    found = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert found.returncode != 0
    assert "token-classification" in found.stderr


def titled_blocks(page: str) -> dict[str, str]:
    """The blocks of a page that are whole files, by their names."""
    return dict(re.findall(r'```python title="([^"]+)"\n(.*?)```', page, re.DOTALL))


def shown_entry_points() -> list[tuple[str, str, str]]:
    """Group, name and object of every entry point of the page."""
    return re.findall(r'    \[project\.entry-points\."([^"]+)"\]\n    (\S+) = "([^"]+)"', PAGE)


def entry_points_of_the_page() -> str:
    """The entry points as the page shows them, in the form in which an installed package has them."""
    shown = shown_entry_points()
    assert len(shown) >= 3
    return "".join(f"[{group}]\n{name} = {place}\n" for group, name, place in shown)


# ----------------------------------------------------------------------------------------- the backend of the page


@pytest.fixture(scope="module")
def table_teacher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """The page's backend, installed, with its table of next words; the settings of a dump from it."""
    path = tmp_path_factory.mktemp("next-words")
    (path / "next_words.py").write_text(titled_blocks(PAGE)["next_words.py"])
    tokenizer = bpe_tokenizer()
    tokenizer.save_pretrained(path / "tokenizer")
    llama(len(tokenizer), seed=2).save_pretrained(path / "student")
    tokenizer.save_pretrained(path / "student")
    (path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    (path / "table.json").write_text(json.dumps(next_words(tokenizer)))
    group, name, place = next(found for found in shown_entry_points() if found[0] == BACKENDS.group)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(path))
        # The plugins of a table are read once.
        patch.setitem(vars(BACKENDS), "_plugins", {name: [EntryPoint(name, place, group)]})
        yield {
            "output": str(path / "cache"),
            "teacher": {
                "backend": "next-words",
                "model": str(path / "table.json"),
                "tokenizer": str(path / "tokenizer"),
            },
            "corpus": {"paths": [str(path / "texts.jsonl")]},
            "sequences": {"max_length": 16},
        }
        BACKENDS._used.pop(name, None)


def next_words(tokenizer: Any) -> dict[int, list[tuple[int, float]]]:
    """For each token of the texts the four most frequent next ones, with log-probabilities that leave a tail."""
    counts: dict[int, Counter[int]] = {}
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        for before, after in pairwise(ids):
            counts.setdefault(before, Counter())[after] += 1
    table = {}
    for token, found in counts.items():
        padded = found + Counter({other: 0.01 for other in range(4) if other not in found})  # type: ignore[dict-item]
        total = 1.2 * sum(padded.values())
        table[token] = [(after, float(np.log(count / total))) for after, count in padded.most_common(4)]
    return table


@pytest.fixture(scope="module")
def table_cache(table_teacher: dict[str, Any]) -> str:
    dump_teacher(build(DumpConfig, table_teacher), progress=False)
    return str(table_teacher["output"])


def test_cache_of_the_backend_holds_its_table_and_no_more(table_teacher: dict[str, Any], table_cache: str) -> None:
    cache = open_cache(table_cache)
    manifest = cache.manifest
    assert manifest.targets == TargetsRecord(top_k=4, scalars=(), tail="remainder")
    assert (manifest.teacher.backend, manifest.teacher.identity.kind) == ("next-words", "import")
    assert (manifest.teacher.num_layers, manifest.teacher.dtype) == (None, None)
    assert verify_cache(table_cache, deep=True).problems == []
    batch = cache.read(range(len(cache)))
    assert (batch.targets.entropy_P, batch.targets.gold_logprob_P) == (None, None)
    table = json.loads(Path(table_teacher["teacher"]["model"]).read_text())
    read = np.concatenate([piece[:-1] for piece in np.split(batch.tokens_T, batch.token_offsets_N1[1:-1])])
    for position, token in enumerate(read):
        ids, logprobs = zip(*table[str(token)], strict=True)
        np.testing.assert_array_equal(batch.targets.ids_PK[position], ids)
        np.testing.assert_allclose(batch.targets.logprobs_PK[position], logprobs, atol=5e-3)  # float16
        assert batch.targets.log_tail_P[position] == pytest.approx(np.log(1 - np.exp(logprobs).sum()), abs=0.03)
    columns = cache.sequence_table().column_names
    assert "kept_mass" in columns
    assert not {"teacher_loss", "teacher_entropy"} & set(columns)
    totals = inspect_cache(cache)["totals"]
    assert (totals["teacher_loss"], totals["teacher_entropy"]) == (None, None)
    assert totals["num_labelled"] == manifest.num_positions
    assert 0.7 < totals["kept_mass"] < 0.9


def test_dump_of_the_backend_is_resumed_by_the_content_of_its_table(
    table_teacher: dict[str, Any], table_cache: str, tmp_path: Path
) -> None:
    assert dump_teacher(build(DumpConfig, table_teacher), progress=False).num_shards_written == 0
    other = json.loads(Path(table_teacher["teacher"]["model"]).read_text())
    other.popitem()
    (tmp_path / "table.json").write_text(json.dumps(other))
    changed = merge(table_teacher, {"teacher": {"model": str(tmp_path / "table.json")}})
    with pytest.raises(CacheError, match=r"teacher\.identity\.sha256 is"):
        dump_teacher(build(DumpConfig, changed), progress=False)


def test_a_student_learns_from_the_cache_of_the_backend(table_cache: str, tmp_path: Path) -> None:
    student = str(Path(table_cache).parent / "student")
    settings = {"student": {"model": student}, "max_steps": 60, "learning_rate": 0.01}
    config = build(TrainConfig, {"cache": table_cache, "output": str(tmp_path), **settings})
    train_student(config, progress=True)
    found = evaluate_students(table_cache, [student, str(tmp_path)], progress=False).to_dict()
    before, after = found["students"]
    assert after["kl"] < 0.35 * before["kl"]
    assert after["agreement"] > 0.3


def test_peek_shows_what_the_cache_of_the_backend_knows(table_cache: str) -> None:
    view = peek_cache(table_cache, 0, count=4)
    assert isinstance(view, PeekResult)
    for position in view.positions:
        kept = {choice.id: choice.probability for choice in position.top}
        assert position.entropy is None
        assert position.gold is not None
        assert position.gold.probability == kept.get(position.gold.id)
    assert "entropy" not in view.render()
    json.dumps(view.to_dict(), allow_nan=False)
    for select, missing in (("entropy", "entropy"), ("loss", "gold_logprob")):
        with pytest.raises(ConfigError, match=rf"cannot be selected by {select}: .* not store {missing}; use --select"):
            peek_cache(table_cache, 0, select=select)


def test_what_the_backend_cannot_give_is_an_error_that_names_it(table_teacher: dict[str, Any], tmp_path: Path) -> None:
    rows = table_after("| setting of the dump |")
    assert len(rows) >= 13
    for setting, words in rows:
        changed = merge({**table_teacher, "output": str(tmp_path)}, parse_assignments([setting]))
        for verb in (dump_teacher, preview_dump):
            with pytest.raises(TeacherError) as caught:
                verb(build(DumpConfig, changed), progress=False)
            assert words in str(caught.value), setting
            assert re.search(r"; (set|choose) ", str(caught.value)), "the error says what to do"
        assert not list(tmp_path.iterdir())
    with pytest.raises(TeacherError, match=r"kdcache estimate needs the logits of the whole vocabulary"):
        estimate_presets(build(DumpConfig, table_teacher), progress=False)


def test_what_the_cache_of_the_backend_does_not_have_is_an_error_that_names_it(table_cache: str) -> None:
    rows = table_after("| setting of the training |")
    assert len(rows) >= 7
    settings = {"cache": table_cache, "output": "run", "student": {"model": str(Path(table_cache).parent / "student")}}
    for setting, words in rows:
        with pytest.raises(ConfigError) as caught:
            preview_training(build(TrainConfig, merge(settings, parse_assignments([setting]))))
        assert words in str(caught.value), setting
    with pytest.raises(TeacherError, match=r"its logits cannot be made again here; check .* verify --deep"):
        verify_against_teacher(table_cache, 1, progress=False)


def test_every_loss_works_on_the_cache_of_the_backend_or_is_refused_by_name(table_cache: str) -> None:
    context = context_of(open_cache(table_cache))
    assert not context.has("entropy")
    assert not context.has("gold_logprob")
    parts = {name: table[name] for table in (LOSSES, TERMS) for name in table}
    needed = {"hidden_mse": {"layers": {1: 1}}, "hidden_cosine": {"layers": {1: 1}}}
    refused = set()
    for name, part in parts.items():
        reason = incompatibility(part(weight=1, **needed.get(name, {})), context)
        if reason is not None:
            refused.add(name)
            assert re.search("hidden states|raw outputs|labels|pairs of texts|relevance", reason), name
    # Losses look at kept ids and the tail; terms at states, raw outputs and labels of texts, which the cache lacks.
    assert refused == set(TERMS)


def table_after(head: str) -> list[tuple[str, str]]:
    """The rows of the page's table that begins with ``head``: a setting and what the error about it names."""
    lines = PAGE[PAGE.index(head) :].split("\n\n")[0].splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [(setting.strip("`"), words) for setting, words in cells]
