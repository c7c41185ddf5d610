"""Mistakes that a user can make: one message, exit code 1 (2 for wrong usage), never a traceback."""

from __future__ import annotations

import errno
import os
import shutil
import sys

import pytest
import torch
import transformers

from kdcache.cache import open_cache
from kdcache.config import build
from kdcache.dump import DumpConfig, dump_teacher
from kdcache.storage.folder import Folder
from tests.cli.conftest import run_process
from tests.tiny import bpe_tokenizer, llama, word_tokenizer

READERS = [
    ["inspect", "CACHE"],
    ["verify", "CACHE", "--quiet"],
    ["peek", "CACHE"],
    ["train-student", "--cache", "CACHE", "--student-size", "nano", "--output", "OUT"],
    ["train-student", "--cache", "CACHE", "--student-size", "nano", "--output", "OUT", "--dry-run"],
    ["evaluate", "--cache", "CACHE", "--student", "TEACHER"],
]
MISSPELT = ["--set", "targets.topk=1"]
readers = pytest.mark.parametrize("arguments", READERS, ids=lambda arguments: " ".join(arguments[:1] + arguments[-1:]))


def fill(arguments, **paths):
    return [paths.get(argument, argument) for argument in arguments]


@pytest.fixture
def dump(run, teacher_dir, corpus_file, tmp_path):
    """Run dump-teacher with some options changed (None leaves one out)."""

    def dump_with(*more, **changes):
        values = {"teacher": teacher_dir, "corpus": corpus_file, "output": tmp_path / "out", **changes}
        options = [part for name, value in values.items() if value is not None for part in (f"--{name}", value)]
        # Within the tiny teacher's context of 64 positions.
        return run("dump-teacher", *options, "--max-length", 32, "--device", "cpu", "--quiet", *more)

    return dump_with


# ------------------------------------------------------------------------------------------- commands that read


@readers
def test_no_cache_there(run, arguments, tmp_path, teacher_dir):
    message = run(*fill(arguments, CACHE=tmp_path / "none", OUT=tmp_path / "o", TEACHER=teacher_dir)).message()
    assert f"there is no cache in {tmp_path / 'none'}" in message
    assert "dump-teacher" in message
    assert not (tmp_path / "o").exists()


@readers
def test_half_a_cache(run, arguments, tmp_path, dumped, teacher_dir):
    half = shutil.copytree(dumped, tmp_path / "half")
    (half / "manifest.json").unlink()
    (half / "commits" / "000001.json").unlink()
    message = run(*fill(arguments, CACHE=half, OUT=tmp_path / "o", TEACHER=teacher_dir)).message()
    total = open_cache(str(dumped)).manifest.num_shards
    assert f"is unfinished: {total - 1} of {total} shards are written" in message
    assert "run the command that began it again" in message


@readers
def test_a_garbled_manifest(run, arguments, tmp_path, dumped, teacher_dir):
    copy = shutil.copytree(dumped, tmp_path / "copy")
    (copy / "manifest.json").write_text('{"format_version": 1')
    outcome = run(*fill(arguments, CACHE=copy, OUT=tmp_path / "o", TEACHER=teacher_dir))
    assert outcome.code == 1
    assert "manifest.json is not valid JSON" in outcome.out + outcome.err
    assert "Traceback" not in outcome.err


@readers
def test_a_manifest_of_the_future(run, arguments, tmp_path, teacher_dir):
    (tmp_path / "manifest.json").write_text('{"format_version": 99, "new": 1}')
    message = run(*fill(arguments, CACHE=tmp_path, OUT=tmp_path / "o", TEACHER=teacher_dir)).message()
    assert "format version 99" in message
    assert "install a newer kdcache" in message


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--sequence", 9999], "there is no sequence 9999"),
        (["--sequence", -1], "there is no sequence -1"),
        (["--at", "0,9999"], "has no position 9999"),
        (["--select", "entrpy"], "did you mean 'entropy'"),
    ],
)
def test_peek_at_what_is_not_there(run, dumped, arguments, words):
    assert words in run("peek", dumped, *arguments).message()


def test_peek_with_a_tokenizer_that_is_none(run, dumped, tmp_path):
    copy = shutil.copytree(dumped, tmp_path / "copy")
    (copy / "tokenizer" / "tokenizer.json").write_text("{}")
    assert "tokenizer.json" in run("peek", copy).message()


@pytest.mark.parametrize(
    "arguments",
    [["--sequence", "two"], ["--at", "a,b"], ["--count", "0"], ["--top", "-1"]],
    ids=" ".join,
)
def test_wrong_usage_of_peek(run, dumped, arguments):
    outcome = run("peek", dumped, *arguments)
    assert outcome.code == 2
    assert arguments[0] in outcome.err
    assert outcome.out == ""


def test_verify_against_a_teacher_that_is_not_there(run, dumped):
    message = run("verify", dumped, "--against-teacher", 2, "--teacher", "/no/such/model", "--quiet").message()
    assert "there is no model at /no/such/model" in message
    assert "no sequences" not in message
    assert "at least one" in run("verify", dumped, "--against-teacher", 0, "--quiet").message()


# -------------------------------------------------------------------------------------------------- dump-teacher


@pytest.mark.parametrize(
    ("changes", "more", "words"),
    [
        ({"corpus": "/no/such/file.jsonl"}, [], ["/no/such/file.jsonl"]),
        ({}, ["--text-field", "body"], ["body", "text"]),
        ({"teacher": "/no/such/model"}, [], ["there is no model at /no/such/model"]),
        ({"teacher": "nobody/nothing"}, [], ["cannot load nobody/nothing", "not a local path"]),
        ({"teacher": "none.gguf"}, [], ["there is no model at none.gguf"]),
        ({}, ["--top-k", 100_000], ["--top-k 100000 is more than the", "vocabulary"]),
        ({}, ["--top-k", 0], ["targets of the kind top-k need a top_k of 1 or more", "0"]),
        ({}, ["--hidden-states", "7"], ["no hidden state 7", "0 (embeddings) to 2 (last)"]),
        ({}, ["--hidden-states", "top"], ["'top'"]),
        ({}, ["--dtype", "float61"], ["unknown dtype 'float61'", "did you mean 'float64'"]),
        ({}, ["--set", "teacher.device=gpu0"], ["device 'gpu0' cannot be used"]),
        ({}, ["--max-length", 1], ["sequences.max_length"]),
        ({"teacher": None}, [], ["'teacher.model' is required"]),
        ({"corpus": None}, [], ["'corpus' is required"]),
        ({"output": None}, [], ["'output' is required"]),
        ({}, ["--set", "targets.topk=5"], ["targets.topk", "did you mean 'top_k'"]),
        ({}, ["--set", "target.top_k=5"], ["'target'", "did you mean 'targets'"]),
        ({}, ["--set", "targets.codec.grd=5"], ["grd"]),
        ({}, ["--set", "targets.codec=compcat"], ["did you mean 'compact'"]),
        ({}, ["--set", "hidden_states.codec=bf61"], ["did you mean 'bf16'"]),
        ({}, ["--set", "task=causal-ml"], ["did you mean 'causal-lm'"]),
        ({}, ["--set", "targets"], ["--set takes key.sub=value", "'targets'"]),
        ({}, ["--set", "targets.top_k={"], ["--set targets.top_k={ is not valid YAML"]),
        ({}, ["--set", "targets.top_k=many"], ["targets.top_k", "many"]),
        ({}, ["--set", "targets=5"], ["targets", "5"]),
        ({}, ["--config", "/no/such.yaml"], ["cannot read configuration file /no/such.yaml", "No such file"]),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_mistakes_in_settings(dump, tmp_path, changes, more, words):
    message = dump(*more, **changes).message()
    for word in words:
        assert word in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("output: x\nteacher: [", ["is not valid YAML: line 2, column 11: "]),
        ("- a\n- b\n", ["must hold a mapping", "list"]),
        ("just words", ["must hold a mapping", "str"]),
        ("temprature: 2\n", ["unknown setting 'temprature'", "known: "]),
        ("sequences: {pakcing: window}\n", ["sequences.pakcing", "did you mean 'packing'"]),
        (b"\xff\xfe\x00", ["not text"]),
    ],
    ids=repr,
)
def test_mistakes_in_a_file(dump, tmp_path, text, words):
    file = tmp_path / "dump.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    message = dump("--config", file).message()
    for word in (str(file), *words):
        assert word in message


@pytest.mark.parametrize("option", ["--codec", "--hidden-codec", "--task", "--split-text"])
def test_a_choice_that_there_is_not(dump, option):
    outcome = dump(option, "nonsense")
    assert outcome.code == 2
    assert option in outcome.err
    assert "nonsense" in outcome.err


@pytest.mark.parametrize("text", ["", '{"text": ""}\n{"text": "a"}\n'], ids=repr)
def test_a_corpus_with_nothing_in_it(dump, tmp_path, text):
    corpus = tmp_path / "empty.jsonl"
    corpus.write_text(text)
    assert "empty" in dump(corpus=corpus).message()


def test_a_corpus_that_is_no_json(dump, tmp_path):
    corpus = tmp_path / "bad.jsonl"
    corpus.write_text('{"text": "fine"}\n{"text": \n')
    message = dump(corpus=corpus).message()
    assert "bad.jsonl" in message
    assert "2" in message


def test_a_teacher_that_is_an_encoder(dump, tmp_path):
    bpe_tokenizer().save_pretrained(tmp_path / "bert")
    config = transformers.BertConfig(
        vocab_size=300, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    transformers.BertModel(config).save_pretrained(tmp_path / "bert")
    assert "is a BertModel, not a causal language model" in dump(teacher=tmp_path / "bert").message()


def test_a_teacher_that_is_an_encoder_decoder(dump, tmp_path):
    bpe_tokenizer().save_pretrained(tmp_path / "t5")
    config = transformers.T5Config(vocab_size=300, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    assert "encoder-decoder (t5), not a causal language model" in dump(teacher=tmp_path / "t5").message()


def test_a_teacher_without_a_tokenizer(dump, tmp_path):
    llama(300).save_pretrained(tmp_path / "bare")
    assert "cannot load" in dump(teacher=tmp_path / "bare").message()


def test_a_teacher_with_a_smaller_vocabulary_than_its_tokenizer(dump, tmp_path):
    bpe_tokenizer().save_pretrained(tmp_path / "small")
    llama(100).save_pretrained(tmp_path / "small")
    message = dump(teacher=tmp_path / "small").message()
    assert "has the token cat (id 283), but" in message
    assert "only has 100 ids, and its tokenizer 290" in message
    assert "use the tokenizer that belongs to the model" in message


def test_texts_longer_than_the_teachers_context(dump):
    message = dump("--max-length", 512).message()
    assert "was made for 64; use --max-length 64 or less" in message


def test_a_teacher_that_answers_nan(dump, tmp_path):
    tokenizer = bpe_tokenizer()
    tokenizer.save_pretrained(tmp_path / "nan")
    model = llama(len(tokenizer))
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    model.save_pretrained(tmp_path / "nan")
    message = dump(teacher=tmp_path / "nan").message()
    assert "NaN" in message
    assert "(sequence " in message
    assert "check the weights" in message


def test_the_output_holds_another_cache(dump, tmp_path):
    assert dump("--top-k", 4).code == 0
    message = dump("--top-k", 5).message()
    assert f"output {tmp_path / 'out'} holds another cache" in message
    assert "another output" in message


def test_the_output_is_somebody_elses_directory(dump, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    assert "is not empty and holds no cache (found thesis.tex)" in dump().message()


def test_the_output_is_a_file(dump, corpus_file):
    before = corpus_file.read_bytes()
    assert "is a file; give a directory" in dump(output=corpus_file).message()
    assert corpus_file.read_bytes() == before


def test_an_unknown_kind_of_storage(dump):
    assert "cannot open nosuch://bucket/cache" in dump(output="nosuch://bucket/cache").message()


def test_a_full_disk(dump, monkeypatch, tmp_path):
    real = Folder.write

    def full(self, name, data):
        if name.startswith("fields/targets/"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)
        real(self, name, data)

    monkeypatch.setattr(Folder, "write", full)
    message = dump().message()
    assert "No space left on device" in message
    assert "fields/targets/000000" in message
    monkeypatch.undo()
    assert dump().code == 0
    assert open_cache(str(tmp_path / "out"))


# ---------------------------------------------------------------------------------------------------- the student


def test_a_student_with_another_tokenizer(run, dumped, tmp_path):
    tokenizer = word_tokenizer(["the", "cat"])
    tokenizer.save_pretrained(tmp_path / "student")
    llama(len(tokenizer)).save_pretrained(tmp_path / "student")
    options = ["--cache", dumped, "--student", tmp_path / "student", "--output", tmp_path / "o", "--quiet"]
    message = run("train-student", *options, "--device", "cpu", "--max-steps", 1).message()
    assert "tokenizer" in message
    assert not (tmp_path / "o" / "model.safetensors").exists()
    outcome = run("evaluate", "--cache", dumped, "--student", tmp_path / "student", "--device", "cpu", "--quiet")
    assert "tokenizer" in outcome.message()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--student", "/no/such/student"], "/no/such/student"),
        (["--student-size", "huge"], "huge"),
        (["--student-size", "nano", "--student", "x"], "exactly one of model, config_file and size"),
        (["--student-size", "nano", "--epochs", "1", "--max-steps", "1"], "epochs or max_steps, not both"),
        (["--student-config", "/no/such/config.json"], "/no/such/config.json"),
        (["--student-size", "nano", "--set", "objective.forward_lk.weight=1"], "did you mean 'forward_kl'"),
        (["--student-size", "nano", "--set", "lerning_rate=1"], "did you mean 'learning_rate'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_of_train_student(run, dumped, tmp_path, options, words):
    outcome = run(
        "train-student", "--cache", dumped, "--output", tmp_path / "o", "--device", "cpu", "--quiet", *options
    )
    assert words in outcome.message()


def test_evaluate_without_a_student_that_is_there(run, dumped):
    outcome = run("evaluate", "--cache", dumped, "--student", "/no/such/student", "--quiet")
    assert "/no/such/student" in outcome.message()


# ------------------------------------------------------------------------------------------------ real processes


@pytest.mark.parametrize(
    ("python", "arguments"),
    [
        ("preloaded", ["dump-teacher", "--teacher", "/no/such/model", "--corpus", "CORPUS", "--output", "OUT"]),
        ("preloaded", ["dump-teacher", "--teacher", "TEACHER", "--corpus", "CORPUS", "--output", "OUT", *MISSPELT]),
        ("a new one", ["verify", "/no/such/cache"]),
    ],
    ids=str,
)
def test_a_real_process_prints_one_message(tmp_path, teacher_dir, corpus_file, python, arguments, preloaded):
    arguments = fill(arguments, CORPUS=corpus_file, OUT=tmp_path / "out", TEACHER=teacher_dir)
    outcome = run_process(*arguments, python=preloaded if python == "preloaded" else sys.executable)
    lines = [line for line in outcome.err.splitlines() if "it/s" not in line and line.strip()]
    assert outcome.code == 1
    assert "Traceback" not in outcome.err
    assert sum(line.startswith("Error: ") for line in lines) == 1


def test_two_dumps_into_one_output(tmp_path, teacher_dir, corpus_file, dump):
    from kdcache.cache import CacheWriter

    with CacheWriter(Folder(tmp_path / "out")):
        assert "another process is writing" in dump().message()
    config = build(
        DumpConfig,
        {
            "output": str(tmp_path / "out"),
            "teacher": {"model": str(teacher_dir), "device": "cpu"},
            "corpus": {"paths": [str(corpus_file)]},
            "sequences": {"max_length": 32},
        },
    )
    assert dump_teacher(config, progress=False).num_shards_written == 1
