"""Models and caches that bring code of their own: it never runs, nothing asks, and one message says what is refused.

Standard input answers yes to every question.
"""

from __future__ import annotations

import ast
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import kdcache
import kdcache.inspect
import kdcache.peek.texts
from kdcache.cache import layout, open_cache
from kdcache.config import build
from kdcache.dump import dump_teacher
from kdcache.errors import CacheError, TeacherError
from kdcache.models.loading import load_cache_tokenizer
from kdcache.models.pooling import modules_of
from kdcache.students import StudentConfig, load_student
from kdcache.verify.stored import verify_cache
from tests.cache.test_stranger import change_manifest
from tests.task_models import TINY_TASKS, dump_config

FOREIGN = {
    "AutoConfig": "evil.EvilConfig",
    "AutoModelForCausalLM": "evil.EvilLM",
    "AutoTokenizer": ["evil.EvilTokenizer", "evil.EvilTokenizer"],
}
CODE = """
import os
open(os.environ["EXECUTED"], "a").write(__name__)
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class EvilConfig(LlamaConfig):
    model_type = "evil"
class EvilLM(LlamaForCausalLM):
    config_class = EvilConfig
class EvilTokenizer(PreTrainedTokenizerFast):
    pass
"""
UNKNOWN = {"model_type": "evil", "architectures": ["EvilLM"], "auto_map": FOREIGN}


class Payload:
    def __reduce__(self):
        return os.mkdir, (os.environ["EXECUTED"],)


def change_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def pickled_weights(path):
    (path / "model.safetensors").unlink()
    (path / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(), protocol=2))


def weights_elsewhere(path):
    (path / "model.safetensors").rename(path.parent / "elsewhere.safetensors")
    index = {"metadata": {}, "weight_map": {"model.embed_tokens.weight": "../elsewhere.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def custom_generation(path):
    (path / "custom_generate").mkdir()
    (path / "custom_generate" / "generate.py").write_text(CODE)


#: What is done to a sound model, and what is said about it; None where the model is still of use.
MODELS = {
    "unknown architecture": (lambda path: change_json(path / "config.json", **UNKNOWN), "needs Python code"),
    "known architecture": (lambda path: change_json(path / "config.json", auto_map=FOREIGN), None),
    "tokenizer": (
        lambda path: change_json(path / "tokenizer_config.json", tokenizer_class="EvilTokenizer", auto_map=FOREIGN),
        "needs Python code",
    ),
    "generation": (custom_generation, None),
    "quantisation": (
        lambda path: change_json(path / "config.json", quantization_config={"quant_method": "evil"}),
        None,
    ),
    "attention": (
        lambda path: change_json(path / "config.json", attn_implementation="stranger/attention"),
        "asks for compiled code from a repository (attn_implementation stranger/attention",
    ),
    "pickled weights": (pickled_weights, "pickled with more than tensors"),
    "weights elsewhere": (weights_elsewhere, "names the weights ../elsewhere.safetensors, which are no file of"),
}


@pytest.fixture
def executed(tmp_path, monkeypatch):
    """The path that appears when foreign code runs; standard input says yes."""
    path = tmp_path / "EXECUTED"
    monkeypatch.setenv("EXECUTED", str(path))
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 100))
    return path


@pytest.fixture
def model(teacher_dir, tmp_path):
    path = Path(shutil.copytree(teacher_dir, tmp_path / "model"))
    (path / "evil.py").write_text(CODE)
    return path


@pytest.mark.parametrize("kind", MODELS)
def test_no_code_of_a_model_runs(run, executed, dumped, corpus_file, model, tmp_path, kind):
    change, message = MODELS[kind]
    change(model)
    cpu = ["--device", "cpu", "--quiet"]
    lines = {
        "train-student": ["--cache", dumped, "--student", model, "--output", tmp_path / "run", "--max-steps", 1],
        "evaluate": ["--cache", dumped, "--student", model],
        "dump-teacher": ["--teacher", model, "--corpus", corpus_file, "--output", tmp_path / "out", "--max-length", 16],
    }
    for command, arguments in lines.items():
        outcome = run(command, *arguments, *cpu)
        assert not executed.exists(), command
        assert sys.stdin.tell() == 0, f"{command} read an answer"
        if message is None:
            assert outcome.code == 0, outcome.err
        else:
            assert message in outcome.message()
            assert str(model) in outcome.message()
    if message is None:
        saved = [json.loads((tmp_path / "run" / name).read_text()) for name in ("config.json", "tokenizer_config.json")]
        assert not any("auto_map" in settings for settings in saved), "others would be asked to run that code"


def test_a_pipe_that_says_yes_to_everything(preloaded, executed, model, corpus_file, tmp_path):
    change_json(model / "config.json", **UNKNOWN)
    command = [
        "-m",
        "kdcache",
        "dump-teacher",
        "--teacher",
        model,
        "--corpus",
        corpus_file,
        "--output",
        tmp_path / "out",
    ]
    result = subprocess.run([preloaded, *map(str, command)], input="y\n" * 100, capture_output=True, text=True)
    assert result.returncode == 1
    assert "needs Python code" in result.stderr
    assert "[y/N]" not in result.stdout + result.stderr
    assert not executed.exists()


def test_configurations_of_fresh_students(run, executed, dumped, model, tmp_path):
    for changes, message in (
        (UNKNOWN, "unknown model_type 'evil'"),
        ({"attn_implementation": "stranger/attention"}, "asks for compiled code"),
        ({"auto_map": FOREIGN}, None),
    ):
        change_json(model / "config.json", **changes)
        arguments = ["--cache", dumped, "--student-config", model / "config.json", "--max-steps", 1, "--device", "cpu"]
        outcome = run("train-student", *arguments, "--output", tmp_path / "run", "--quiet")
        assert message in outcome.message() if message else outcome.code == 0, outcome.err
        change_json(model / "config.json", model_type="llama", attn_implementation=None)
        assert not executed.exists()
    assert "auto_map" not in json.loads((tmp_path / "run" / "config.json").read_text())


def test_modules_of_sentence_models(tmp_path):
    modules = [
        {"path": "", "type": "sentence_transformers.models.Transformer"},
        {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    ]
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    assert modules_of(str(tmp_path)).pooling == "cls"
    for changes, message in (
        (
            {"type": "custom_st.Transformer"},
            r"module of its own Python code in modules\.json \(custom_st\.Transformer\)",
        ),
        ({"path": "../../elsewhere"}, r"module in \.\./\.\./elsewhere in modules\.json, which is not in the model's"),
        ({"path": "/etc"}, r"module in /etc in modules\.json, which is not in the model's folder"),
    ):
        (tmp_path / "modules.json").write_text(json.dumps([{**modules[0], **changes}, modules[1]]))
        with pytest.raises(TeacherError, match=message):
            modules_of(str(tmp_path))
    for nonsense in ("{", "[1]", '[{"path": ""}]', '{"type": 1}'):
        (tmp_path / "modules.json").write_text(nonsense)
        with pytest.raises(TeacherError, match=r"modules\.json of .* cannot be read"):
            modules_of(str(tmp_path))


def test_sentence_models_with_pickled_layers(executed, tmp_path):
    found = TINY_TASKS["embedding"].write(tmp_path)
    teacher = Path(found["teacher"])
    paths = {"Transformer": "", "Pooling": "1_Pooling", "Dense": "2_Dense"}
    modules = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for kind, path in paths.items()]
    (teacher / "modules.json").write_text(json.dumps(modules))
    settings = {"1_Pooling": {"pooling_mode_cls_token": True}, "2_Dense": {"in_features": 16, "out_features": 4}}
    for folder, values in settings.items():
        (teacher / folder).mkdir()
        (teacher / folder / "config.json").write_text(json.dumps(values))
    (teacher / "2_Dense" / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(), protocol=2))
    with pytest.raises(TeacherError, match=r"Dense layer of .* is pickled with more than tensors"):
        dump_teacher(dump_config("embedding", found, tmp_path / "cache"), progress=False)
    assert not executed.exists()


#: What else the files of a model may hold, and the error, or None where the model is of use.
NONSENSE = {
    "architectures": ("config.json", {"architectures": 5}, None),
    "activation": ("config.json", {"hidden_act": "evil"}, "hidden_act to evil"),
    "model type": ("config.json", {"model_type": ["llama"]}, "cannot load"),
    "code": ("config.json", {"auto_map": 5}, "cannot load"),
    "attention of parts": ("config.json", {"attn_implementation": {"": "a/b"}}, "asks for compiled code"),
    "tokenizer class": ("tokenizer_config.json", {"tokenizer_class": ["x"]}, "cannot load"),
    "run": ("kdcache_run.json", {"cache": 5, "student": [1]}, None),
}


def test_nonsense_in_the_files_of_a_student(run, dumped, teacher_dir, tmp_path, subtests):
    for kind, (name, changes, message) in NONSENSE.items():
        with subtests.test(kind):
            path = Path(shutil.copytree(teacher_dir, tmp_path / kind))
            if not (path / name).exists():
                (path / name).write_text("{}")
            change_json(path / name, **changes)
            outcome = run("evaluate", "--cache", dumped, "--student", path, "--device", "cpu", "--quiet")
            if message is None:
                assert outcome.code == 0, outcome.err
            else:
                assert message in outcome.message()


# ------------------------------------------------------------------------------------------------------- caches


@pytest.fixture
def cache(dumped, tmp_path):
    return Path(shutil.copytree(dumped, tmp_path / "cache"))


def record_tokenizer_file(cache, name, data):
    """Write a file of the tokenizer and record it as a dump would."""
    path = f"tokenizer/{name}"
    (cache / path).write_bytes(data)
    record = {"path": path, "num_bytes": len(data), "sha256": layout.sha256(data)}

    def change(manifest):
        others = [other for other in manifest["tokenizer_files"] if other["path"] != path]
        manifest["tokenizer_files"] = sorted([*others, record], key=lambda record: record["path"])

    change_manifest(cache, change)


def test_no_code_of_a_cache_runs(run, executed, cache, tmp_path):
    settings = json.loads((cache / "tokenizer" / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "EvilTokenizer", "auto_map": FOREIGN}
    record_tokenizer_file(cache, "tokenizer_config.json", json.dumps(settings).encode())
    record_tokenizer_file(cache, "evil.py", CODE.encode())
    for option, value in (("--student-size", "nano"), ("--student", cache)):
        message = run("train-student", "--cache", cache, option, value, "--output", tmp_path / "run").message()
        assert message.startswith("the tokenizer of the cache needs Python code")
    assert run("peek", cache).code == 0
    assert not executed.exists()
    assert sys.stdin.tell() == 0


def test_a_class_that_transformers_has_is_used_and_the_other_one_forgotten(executed, cache):
    settings = json.loads((cache / "tokenizer" / "tokenizer_config.json").read_text())
    record_tokenizer_file(cache, "tokenizer_config.json", json.dumps({**settings, "auto_map": FOREIGN}).encode())
    tokenizer = load_cache_tokenizer(open_cache(str(cache)).tokenizer_dir())
    assert type(tokenizer).__module__.startswith("transformers.")
    assert "auto_map" not in tokenizer.init_kwargs
    # A class of another name without code is none: tokenizer.json says everything.
    record_tokenizer_file(cache, "tokenizer_config.json", json.dumps({**settings, "tokenizer_class": "Evil"}).encode())
    assert len(load_cache_tokenizer(open_cache(str(cache)).tokenizer_dir())) == len(tokenizer)
    record_tokenizer_file(cache, "tokenizer_config.json", b'{"tokenizer_class": "RagTokenizer"}')
    with pytest.raises(CacheError, match="the tokenizer of the cache has a RagTokenizer"):
        load_cache_tokenizer(open_cache(str(cache)).tokenizer_dir())
    assert not executed.exists()


def test_files_that_the_manifest_does_not_record_take_no_part(run, executed, cache, dumped):
    sound = open_cache(str(dumped))
    (cache / "tokenizer" / "evil.py").write_text(CODE)
    (cache / "tokenizer" / "config.json").write_text(json.dumps(UNKNOWN))
    (cache / "tokenizer" / "added_tokens.json").write_text('{"<extra>": 290}')
    (cache / "tokenizer" / "chat_template.jinja").write_text("evil")
    (cache / "tokenizer" / "additional_chat_templates").mkdir()
    opened = open_cache(str(cache))
    recorded = sorted(Path(record.path).name for record in opened.manifest.tokenizer_files)
    assert sorted(path.name for path in opened.tokenizer_dir().iterdir()) == recorded
    student = load_student(build(StudentConfig, {"size": "nano"}), opened.manifest, opened.tokenizer_dir())
    assert len(student.tokenizer) == sound.manifest.tokenizer.vocab_size
    assert student.tokenizer.chat_template is None
    assert not executed.exists()

    added = ["added_tokens.json", "additional_chat_templates", "chat_template.jinja", "config.json", "evil.py"]
    report = verify_cache(str(cache), progress=False)
    assert report.unlisted == [f"tokenizer/{name}" for name in added]
    assert len(report.problems) == len(added)
    outcome = run("verify", cache, "--quiet")
    assert outcome.code == 1
    assert "PROBLEM file tokenizer/evil.py is not recorded in manifest.json" in outcome.out
    assert "To repair" not in outcome.out
    assert not verify_cache(str(dumped), progress=False).problems


REPLACE = {"type": "Replace", "pattern": {"String": "e"}, "content": "e" * 40}
DECODERS = {
    "twice": ({"type": "Sequence", "decoders": [REPLACE, {"type": "Fuse"}, REPLACE]}, "1,600"),
    "nested": ({"type": "Sequence", "decoders": [{"type": "Sequence", "decoders": [REPLACE, REPLACE]}]}, "1,600"),
    "expression": ({**REPLACE, "pattern": {"Regex": ""}, "content": "e" * 100}, "101"),
    "once": ({**REPLACE, "content": "\u2581"}, None),
    "a long one": ({**REPLACE, "pattern": {"String": "e" * 20}}, None),
}


@pytest.mark.parametrize("kind", DECODERS)
def test_a_decoder_that_makes_texts_enormous(run, cache, tmp_path, kind):
    """A process that uses such a one is killed for its memory."""
    decoder, growth = DECODERS[kind]
    settings = json.loads((cache / "tokenizer" / "tokenizer.json").read_text())
    record_tokenizer_file(cache, "tokenizer.json", json.dumps({**settings, "decoder": decoder}).encode())
    train = [
        "--cache",
        cache,
        "--student-size",
        "nano",
        "--output",
        tmp_path / "run",
        "--max-steps",
        1,
        "--device",
        "cpu",
    ]
    for arguments in (["peek", cache], ["train-student", *train]):
        outcome = run(*arguments)
        if growth is None:
            assert outcome.code == 0, outcome.err
        else:
            assert f"has a decoder that makes texts up to {growth} times as long" in outcome.message()


def test_a_tokenizer_on_which_the_library_panics(run, cache, tmp_path):
    """Panics of Rust are no exceptions of a kind that anybody catches."""
    settings = json.loads((cache / "tokenizer" / "tokenizer.json").read_text())
    settings["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    record_tokenizer_file(cache, "tokenizer.json", json.dumps(settings).encode())
    assert "cannot be read: the library tokenizers cannot use it" in run("peek", cache).err
    outcome = run("train-student", "--cache", cache, "--student-size", "nano", "--output", tmp_path / "run")
    assert outcome.code == 1
    assert "Error: cannot load the tokenizer of the cache: the library tokenizers cannot use it" in outcome.err


def test_a_panic_anywhere_else_is_one_message(run, cache, monkeypatch):
    class PanicException(BaseException):
        pass

    def inspect_cache(cache):
        raise PanicException("byte index 3 is not a char boundary")

    monkeypatch.setattr(kdcache.inspect, "inspect_cache", inspect_cache)
    assert "a library failed on this input" in run("inspect", cache).message()


def test_a_token_as_long_as_its_file(run, cache, monkeypatch):
    monkeypatch.setattr(kdcache.peek.texts, "_MOST_CHARACTERS", 10)
    assert "makes 11 characters of 6 tokens (at most 10 are shown)" in run("peek", cache).message()


def test_a_change_after_the_check_takes_no_part(cache):
    """The loader's directory is not the cache's own: whoever may write to the cache cannot change it any more."""
    directory = open_cache(str(cache)).tokenizer_dir()
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    for path in (cache / "tokenizer").iterdir():
        path.write_text("{}")
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before
    assert directory.stat().st_mode & 0o077 == 0


def test_the_private_directory_ends_with_its_process(preloaded, cache):
    """It outlives the cache, and a process forked from it does not remove it."""
    code = f"""
import multiprocessing, os
from kdcache.cache import open_cache
directory = open_cache({str(cache)!r}).tokenizer_dir()
child = multiprocessing.get_context("fork").Process(target=lambda: None)
child.start()
child.join()
assert sorted(os.listdir(directory)) == ["tokenizer.json", "tokenizer_config.json"], os.listdir(directory)
assert open_cache({str(cache)!r}).tokenizer_dir() == directory
print(directory)
"""
    found = subprocess.run([preloaded, "-c", code], capture_output=True, text=True, timeout=60)
    assert found.returncode == 0, found.stderr
    assert not Path(found.stdout.strip()).exists()


def test_every_load_refuses_foreign_code():
    """A load that does not say so asks on standard input, and runs what it is told to."""
    found = 0
    for path in Path(kdcache.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                call = ast.unparse(node)
                if node.func.attr == "from_pretrained" or (
                    "load_dataset" in node.func.attr and "data_files" not in call
                ):
                    assert "trust_remote_code=False" in call or "**_NO_FOREIGN_CODE" in call, f"{path}: {call}"
                    found += 1
                if node.func.attr == "load" and ast.unparse(node.func.value) in ("torch", "np", "numpy", "pickle"):
                    assert "weights_only=True" in call or "allow_pickle=False" in call, f"{path}: {call}"
                    found += 1
    assert found >= 5
