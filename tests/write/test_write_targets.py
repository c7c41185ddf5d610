"""Targets that the teacher writes: the same file however it came about, and what is refused."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from tokenizers import decoders

from kdcache.cache import open_cache
from kdcache.config import build
from kdcache.dump import DumpConfig, dump_teacher
from kdcache.errors import ConfigError, CorpusError, TeacherError
from kdcache.models.generation import write_texts
from kdcache.teachers.sampling import Sampler, nucleus
from kdcache.write import WriteConfig, preview_targets, write_targets
from tests.cli.conftest import run  # noqa: F401
from tests.task_models import SENTENCES, t5, t5_tokenizer
from tests.tiny import bpe_tokenizer, llama

run_module = importlib.import_module("kdcache.write.run")
TEXTS = [*SENTENCES[:3], "", *SENTENCES[3:], None, *(f"{text} and {SENTENCES[0]}" for text in SENTENCES)]
ROWS = [{"text": text, "gold": f"gold {n}" if n % 3 else None, "year": n} for n, text in enumerate(TEXTS)]


def tokenizer() -> Any:
    """The tiny tokenizer, which decodes to texts with spaces."""
    found = t5_tokenizer()
    found._tokenizer.decoder = decoders.Metaspace()
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A teacher and a corpus."""
    path = tmp_path_factory.mktemp("write")
    t5(seed=1).save_pretrained(path / "teacher")
    tokenizer().save_pretrained(path / "teacher")
    (path / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return {"teacher": str(path / "teacher"), "corpus": str(path / "corpus.jsonl")}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks, so that there are borders."""
    monkeypatch.setattr(run_module, "_BLOCK", 4)


BEAMS = {"beams": 3}
SAMPLED = {"sample": True, "temperature": 0.7, "top_p": 0.9, "seed": 3}


def config_of(found: dict[str, str], output: Path, *, limit: int | None = None, **more: Any) -> WriteConfig:
    """How the tiny teacher writes about the tiny corpus."""
    corpus = {"paths": [found["corpus"]], "text_field": "text", "columns": {"target": "gold"}, "limit_documents": limit}
    return build(
        WriteConfig,
        {
            "output": str(output),
            "teacher": {"model": found["teacher"], "device": "cpu"},
            "corpus": corpus,
            "sequences": {"max_length": 24, "max_target_length": 12, "prefix": "red "},
            "writing": BEAMS,
            **more,
        },
    )


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_document_has_its_line(found: dict[str, str], tmp_path: Path) -> None:
    result = write_targets(config_of(found, tmp_path / "out.jsonl"), progress=True)
    lines = lines_of(tmp_path / "out.jsonl")
    assert [line["input"] for line in lines] == [text or "" for text in TEXTS]
    assert [line["reference"] for line in lines] == [row["gold"] for row in ROWS]
    assert [line["year"] for line in lines] == list(range(len(TEXTS)))
    assert [line["target"] is None for line in lines] == [not text for text in TEXTS]
    assert result.counts.num_written == len(TEXTS)
    assert result.counts.num_empty == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "out.jsonl.settings.json"]


@pytest.mark.parametrize("beams", [1, 3])
def test_the_text_is_the_models_own(beams: int, found: dict[str, str], tmp_path: Path) -> None:
    write_targets(config_of(found, tmp_path / "out.jsonl", writing={"beams": beams}), progress=False)
    model, encoder = t5(seed=1).eval(), tokenizer()
    for line in lines_of(tmp_path / "out.jsonl"):
        if line["target"] is None:
            continue
        ids = encoder(f"red {line['input']}")["input_ids"]
        ids = ids if len(ids) <= 24 else [*ids[:23], encoder.eos_token_id]
        more = {"num_beams": beams, "max_new_tokens": 12, "suppress_tokens": list(range(len(encoder), 64))}
        written = model.generate(torch.tensor([ids]), **more)
        assert line["target"] == encoder.decode(written[0], skip_special_tokens=True)


@pytest.mark.parametrize("writing", [BEAMS, SAMPLED])
@pytest.mark.parametrize("lost", [5, 60, 400, 10**6])
def test_goes_on_after_a_crash_to_the_same_file(
    writing: dict[str, Any], lost: int, found: dict[str, str], tmp_path: Path
) -> None:
    config = config_of(found, tmp_path / "out.jsonl", writing=writing)
    write_targets(config, progress=False)
    whole = (tmp_path / "out.jsonl").read_bytes()
    kept = whole[: max(0, len(whole) - lost)]
    (tmp_path / "out.jsonl").write_bytes(kept)
    result = write_targets(config, progress=False)
    assert (tmp_path / "out.jsonl").read_bytes() == whole
    assert result.counts.num_written == len(TEXTS) - kept.count(b"\n")
    assert write_targets(config, progress=False).counts.num_written == 0
    assert (tmp_path / "out.jsonl").read_bytes() == whole


def test_a_drawn_text_depends_on_seed_and_document_alone(found: dict[str, str], tmp_path: Path) -> None:
    targets = {}
    for name, batch_tokens, seed in (("wide", 8192, 3), ("narrow", 1, 3), ("other", 8192, 4)):
        more = {"batch_tokens": batch_tokens, "writing": SAMPLED | {"seed": seed}}
        write_targets(config_of(found, tmp_path / f"{name}.jsonl", **more), progress=False)
        targets[name] = [line["target"] for line in lines_of(tmp_path / f"{name}.jsonl")]
    assert targets["wide"] == targets["narrow"]
    differing = sum(a != b for a, b in zip(targets["wide"], targets["other"], strict=True))
    assert differing > len(TEXTS) / 2
    assert len({target for target in targets["wide"] if target}) > len(TEXTS) / 2


def test_a_fixed_start_of_the_corpus_gets_the_same_texts(found: dict[str, str], tmp_path: Path) -> None:
    write_targets(config_of(found, tmp_path / "all.jsonl", writing=SAMPLED), progress=False)
    write_targets(config_of(found, tmp_path / "six.jsonl", writing=SAMPLED, limit=6), progress=False)
    assert lines_of(tmp_path / "six.jsonl") == lines_of(tmp_path / "all.jsonl")[:6]


OTHER = {
    "writing.beams": {"writing": {"beams": 2}},
    "writing.sample": {"writing": {"sample": True}},
    "sequences.prefix": {"sequences": {"max_length": 24, "max_target_length": 12}},
    "sequences.max_target_length": {"sequences": {"max_length": 24, "max_target_length": 11, "prefix": "red "}},
    "corpus.num_documents": {"limit": 7},
    "batch_tokens": {"batch_tokens": 100},
}


@pytest.mark.parametrize("name", OTHER)
def test_a_file_of_other_settings_is_left_alone(name: str, found: dict[str, str], tmp_path: Path) -> None:
    write_targets(config_of(found, tmp_path / "out.jsonl"), progress=False)
    before = (tmp_path / "out.jsonl").read_bytes()
    for call in (write_targets, preview_targets):
        with pytest.raises(ConfigError, match=rf"begun with other settings:.*{name} is .* there and .* here"):
            call(config_of(found, tmp_path / "out.jsonl", **OTHER[name]))
    assert (tmp_path / "out.jsonl").read_bytes() == before


def test_a_file_of_another_teacher_is_left_alone(found: dict[str, str], tmp_path: Path) -> None:
    write_targets(config_of(found, tmp_path / "out.jsonl"), progress=False)
    t5(seed=2).save_pretrained(tmp_path / "other")
    tokenizer().save_pretrained(tmp_path / "other")
    with pytest.raises(ConfigError, match=r"teacher\.identity\.sha256 is"):
        write_targets(config_of(found | {"teacher": str(tmp_path / "other")}, tmp_path / "out.jsonl"))


def test_a_teacher_that_moved_is_the_same(found: dict[str, str], tmp_path: Path) -> None:
    config = config_of(found, tmp_path / "out.jsonl", limit=6)
    write_targets(config, progress=False)
    t5(seed=1).save_pretrained(tmp_path / "moved")
    tokenizer().save_pretrained(tmp_path / "moved")
    again = config_of(found | {"teacher": str(tmp_path / "moved")}, tmp_path / "out.jsonl", limit=6)
    assert write_targets(again, progress=False).counts.num_written == 0
    settings = json.loads((tmp_path / "out.jsonl.settings.json").read_text())
    assert settings["teacher"]["name"] == "teacher"
    assert str(tmp_path) not in json.dumps(settings)


def test_what_cannot_be_written_to(found: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text('{"a": 1}\n')
    (tmp_path / "folder.jsonl").mkdir()
    for output, words in (
        (tmp_path / "mine.jsonl", "it is not known what wrote it"),
        (tmp_path / "folder.jsonl", "is a directory"),
        (tmp_path / "out.parquet", "ends in .jsonl"),
        ("s3://bucket/out.jsonl", "local file"),
    ):
        with pytest.raises(ConfigError, match=words):
            write_targets(config_of(found, output))  # type: ignore[arg-type]
    assert (tmp_path / "mine.jsonl").read_text() == '{"a": 1}\n'


def test_two_processes_do_not_write_to_one_file(found: dict[str, str], tmp_path: Path) -> None:
    with (
        FileLock(tmp_path / "out.jsonl.lock"),
        pytest.raises(ConfigError, match=r"another process is writing to .*out\.jsonl"),
    ):
        write_targets(config_of(found, tmp_path / "out.jsonl"))


def test_a_causal_teacher_is_refused(found: dict[str, str], tmp_path: Path) -> None:
    encoder = bpe_tokenizer()
    llama(len(encoder)).save_pretrained(tmp_path / "llama")
    encoder.save_pretrained(tmp_path / "llama")
    with pytest.raises(TeacherError, match=r"is a llama, which is no encoder-decoder; .* seq2seq-lm"):
        write_targets(config_of(found | {"teacher": str(tmp_path / "llama")}, tmp_path / "out.jsonl"))


def test_a_column_that_the_file_has_itself(found: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "corpus.jsonl").write_text(json.dumps({"text": "the cat", "gold": "a", "target": "b"}) + "\n")
    with pytest.raises(CorpusError, match="column 'target' that is neither"):
        write_targets(config_of(found | {"corpus": str(tmp_path / "corpus.jsonl")}, tmp_path / "out.jsonl"))


@pytest.mark.parametrize(
    ("writing", "words"),
    [
        ({"sample": True, "beams": 4}, "beams belong to beam search"),
        ({"temperature": 2.0}, "temperature is for sampled texts"),
        ({"beams": 0}, "greater than or equal to 1"),
        ({"sample": True, "top_p": 0}, "greater than 0"),
    ],
)
def test_settings_that_contradict(writing: dict[str, Any], words: str, found: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        config_of(found, tmp_path / "out.jsonl", writing=writing)


def test_a_dry_run_writes_nothing(found: dict[str, str], tmp_path: Path) -> None:
    estimate = preview_targets(config_of(found, tmp_path / "out.jsonl"))
    assert (estimate.num_documents, estimate.num_done) == (len(TEXTS), 0)
    assert estimate.eta_s > 0
    assert len(estimate.examples) == 2
    assert list(tmp_path.iterdir()) == []


def test_the_file_is_a_corpus_to_dump(found: dict[str, str], tmp_path: Path) -> None:
    write_targets(config_of(found, tmp_path / "out.jsonl", writing=SAMPLED), progress=False)
    config = {
        "output": str(tmp_path / "cache"),
        "task": "seq2seq-lm",
        "teacher": {"model": found["teacher"], "device": "cpu"},
        "corpus": {"paths": [str(tmp_path / "out.jsonl")]},
        "sequences": {"max_length": 24, "max_target_length": 12, "prefix": "red "},
        "targets": {"top_k": 8},
    }
    dump_teacher(build(DumpConfig, config), progress=False)
    cache = open_cache(str(tmp_path / "cache"))
    assert len(cache) == sum(bool((line["target"] or "").strip()) for line in lines_of(tmp_path / "out.jsonl"))
    assert set(cache.manifest.corpus.metadata_columns) == {"reference", "year"}


def test_the_command(
    run: Any,  # noqa: F811
    found: dict[str, str],
    tmp_path: Path,
) -> None:
    output = tmp_path / "out.jsonl"
    arguments = ["write-targets", "--teacher", found["teacher"], "--corpus", found["corpus"], "--text-field", "text"]
    arguments += ["--column", "target=gold", "--max-target-length", "8", "--output", output, "-q", "--device", "cpu"]
    dry = run(*arguments, "--dry-run")
    assert dry.code == 0
    assert "Nothing was written" in dry.out
    assert not output.exists()
    outcome = run(*arguments, "--json")
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out)["num_written"] == len(TEXTS)
    again = run(*arguments)
    assert "complete already; nothing was written" in again.out
    assert "writing.beams is 4 there and 2 here" in run(*arguments, "--beams", "2").message()


def test_a_sampler_draws_from_the_distribution() -> None:
    logits_V = torch.tensor([0.0, 1.0, 2.0, -torch.inf, 3.0])
    num = 20_000
    sampler = Sampler(0, range(num), 1, temperature=2.0)
    counts = np.bincount(sampler(0, logits_V.repeat(num, 1)).numpy(), minlength=5)
    np.testing.assert_allclose(counts / num, (logits_V / 2).softmax(0).numpy(), atol=0.01)
    assert counts[3] == 0


def test_the_nucleus_is_the_fewest_ids_that_reach_the_mass() -> None:
    weights_BV = torch.tensor([[0.1, 0.5, 0.15, 0.25], [0.97, 0.01, 0.01, 0.01]])
    kept = [(nucleus(weights_BV, p) > 0).tolist() for p in (0.4, 0.7, 0.8, 0.999)]
    assert [row[0] for row in kept] == [
        [False, True, False, False],
        [False, True, False, True],
        [False, True, True, True],
        [True, True, True, True],
    ]
    assert kept[0][1] == [True, False, False, False]


def test_ids_that_the_tokenizer_has_not_are_never_written() -> None:
    model = t5(seed=1).eval()
    with torch.no_grad():
        model.lm_head.weight[40:] *= 100
    inputs = [np.array([5, 6, 7, 1], np.uint32)]
    written = write_texts(model, tokenizer(), 40, inputs, max_tokens=8, beams=2)
    assert written[0].num_tokens <= 8
    assert written[0].text
