"""Students that embed texts: other widths than the teacher's, and files that sentence-transformers understands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from kdcache.cache import open_cache
from kdcache.config import build
from kdcache.dump import dump_teacher
from kdcache.errors import ConfigError, StudentError, TeacherError
from kdcache.evaluate import evaluate_students
from kdcache.schema import OUTPUTS_FIELD
from kdcache.students import StudentConfig, load_student
from kdcache.train import TrainConfig, train_student
from tests.task_models import SENTENCES, TINY_TASKS, bert, bert_tokenizer, dump_config

#: Narrower than the teacher, whose embeddings have 16 numbers.
WIDTH = 8


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    path = tmp_path_factory.mktemp("sentences")
    made = TINY_TASKS["embedding"].write(path)
    bert("BertModel", width=WIDTH, num_layers=2, seed=3).save_pretrained(path / "narrow")
    bert_tokenizer().save_pretrained(path / "narrow")
    dump_teacher(dump_config("embedding", made, path / "cache"), progress=False)
    return made | {"cache": str(path / "cache"), "narrow": str(path / "narrow")}


def train(found: dict[str, str], output: Path, student: dict[str, Any], **more: Any) -> Path:
    settings = {
        "cache": found["cache"],
        "student": {"model": found["narrow"], **student},
        "output": str(output),
        "max_steps": 8,
        "save_steps": 3,
        "learning_rate": 0.01,
        "batch_sequences": 4,
        "device": "cpu",
    }
    resume = more.pop("resume", False)
    callbacks = more.pop("callbacks", ())
    train_student(build(TrainConfig, settings | more), progress=False, resume=resume, callbacks=callbacks)
    return output


@pytest.fixture(scope="module")
def projected(found: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(found, tmp_path_factory.mktemp("projected") / "run", {"projection": True})


@pytest.fixture(scope="module")
def reduced(found: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(found, tmp_path_factory.mktemp("reduced") / "run", {"pca": True})


def kdcache_vectors(run: Path | str, cache_path: str) -> np.ndarray:
    """The student's own vectors of the first texts of all sequences, as training and evaluation see them."""
    cache = open_cache(cache_path)
    student = load_student(StudentConfig(model=str(run)), cache.manifest, cache.tokenizer_dir())
    student.model.eval()
    encoded = student.tokenizer(SENTENCES, padding=True, truncation=True, max_length=16, return_tensors="pt")
    inputs = {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}
    with torch.no_grad():
        return student.hidden(inputs | {"rows": torch.arange(len(SENTENCES))}).numpy()


def sentence_vectors(run: Path | str) -> np.ndarray:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    model = sentence_transformers.SentenceTransformer(str(run), device="cpu", local_files_only=True)
    return model.encode(SENTENCES, show_progress_bar=False)


def tensors(run: Path) -> dict[str, torch.Tensor]:
    return {
        f"{file.parent.name}/{name}": value
        for file in sorted([run / "model.safetensors", *run.glob("*/model.safetensors")])
        if "checkpoint" not in str(file.parent.name)
        for name, value in load_file(file).items()
    }


@pytest.mark.parametrize("kind", ["projected", "reduced"])
def test_sentence_transformers_gives_the_same_vectors(kind, found, request):
    run = request.getfixturevalue(kind)
    vectors = kdcache_vectors(run, found["cache"])
    assert vectors.shape == (len(SENTENCES), 16 if kind == "projected" else WIDTH)
    np.testing.assert_allclose(sentence_vectors(run), vectors, rtol=1e-4, atol=1e-6)


def test_a_prefix_and_the_length_go_with_the_student(found, tmp_path):
    settings = {"max_length": 12, "pooling": "cls", "normalise": False, "prefix": "the big "}
    dump_teacher(dump_config("embedding", found, tmp_path / "cache", sequences=settings), progress=False)
    run = train({**found, "cache": str(tmp_path / "cache")}, tmp_path / "run", {"model": found["student"]})
    same = train({**found, "cache": str(tmp_path / "cache")}, tmp_path / "bare", {"model": found["student"]})
    (same / "config_sentence_transformers.json").unlink()
    sentence_transformers = pytest.importorskip("sentence_transformers")
    bare = sentence_transformers.SentenceTransformer(str(same), device="cpu", local_files_only=True)
    assert bare.max_seq_length == 12
    expected = bare.encode([f"the big {text}" for text in SENTENCES], show_progress_bar=False)
    np.testing.assert_allclose(sentence_vectors(run), expected, rtol=1e-4, atol=1e-5)
    assert np.abs(np.linalg.norm(expected, axis=1) - 1).max() > 0.01


def test_a_projection_starts_with_the_angles_of_the_pooled_states_and_is_trained(found, projected):
    cache = open_cache(found["cache"])
    config = StudentConfig(model=found["narrow"], projection="linear", seed=1)
    student = load_student(config, cache.manifest, cache.tokenizer_dir())
    weight = student.model.sentence_projection[0].weight.detach()
    assert weight.shape == (16, WIDTH)
    torch.testing.assert_close(weight.T @ weight, torch.eye(WIDTH), atol=1e-5, rtol=0)
    trained = load_file(projected / "2_Dense" / "model.safetensors")["linear.weight"]
    assert (trained.T @ trained - torch.eye(WIDTH)).abs().max() > 1e-3
    assert not any("sentence_projection" in name for name in load_file(projected / "model.safetensors"))


def test_training_brings_students_of_another_width_closer_to_the_teacher(found, projected, reduced, tmp_path):
    before = train(found, tmp_path / "before", {"projection": True}, max_steps=1, learning_rate=1e-12)
    rows = evaluate_students(
        found["cache"], [str(p) for p in (before, projected, reduced)], device="cpu", progress=False
    )
    first, projected_row, reduced_row = (row.metrics for row in rows.students)
    assert projected_row["teacher_cosine"] > first["teacher_cosine"] + 0.05
    assert reduced_row["teacher_cosine"] > 0.1
    assert {"spearman"} == set(rows.teacher.metrics)


def test_a_student_that_cannot_be_compared_has_no_cosine_to_the_teacher(found):
    row = evaluate_students(found["cache"], [found["narrow"]], device="cpu", progress=False).students[0]
    assert row.metrics["teacher_cosine"] is None
    assert row.metrics["spearman"] is not None


def test_pca_keeps_the_directions_with_most_of_the_length(found, reduced):
    cache = open_cache(found["cache"])
    outputs_PC = cache.read(range(len(cache)), fields=(OUTPUTS_FIELD,)).hidden[OUTPUTS_FIELD].astype(np.float64)
    directions = load_file(reduced / "teacher_pca" / "model.safetensors")["linear.weight"].numpy()
    _, _, expected = np.linalg.svd(outputs_PC, full_matrices=False)
    np.testing.assert_allclose(np.abs(directions @ expected[:WIDTH].T), np.eye(WIDTH), atol=1e-4)


@pytest.mark.parametrize("settings", [{"projection": True}, {"pca": True}], ids=["projection", "pca"])
def test_a_run_that_is_resumed_ends_with_the_same_bits(settings, found, tmp_path, request):
    whole = request.getfixturevalue("projected" if "projection" in settings else "reduced")

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 5:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(found, tmp_path / "run", settings, callbacks=[Stop()])
    train(found, tmp_path / "run", settings, resume=True)
    expected, again = tensors(whole), tensors(tmp_path / "run")
    assert set(expected) == set(again)
    assert len({name.split("/")[0] for name in expected}) == 2
    assert all(torch.equal(again[name], value) for name, value in expected.items())


def test_a_run_goes_on_as_the_student_of_another(found, projected, reduced, tmp_path):
    for run, folder in ((projected, "2_Dense"), (reduced, "teacher_pca")):
        output = train(found, tmp_path / folder, {"model": str(run)}, max_steps=2, learning_rate=1e-12)
        np.testing.assert_allclose(
            kdcache_vectors(output, found["cache"]), kdcache_vectors(run, found["cache"]), atol=1e-5
        )
        assert (output / folder / "model.safetensors").exists()


def test_a_run_can_be_a_teacher(found, projected, tmp_path):
    made = {"teacher": str(projected), "corpus": found["corpus"]}
    dump_teacher(dump_config("embedding", made, tmp_path / "cache"), progress=False)
    cache = open_cache(str(tmp_path / "cache"))
    assert cache.manifest.outputs.width == 16
    batch = cache.read(range(len(cache)), fields=(OUTPUTS_FIELD,))
    first = batch.hidden[OUTPUTS_FIELD][batch.position_offsets_N1[:-1]]
    np.testing.assert_allclose(first, kdcache_vectors(projected, found["cache"]), rtol=1e-4, atol=1e-6)


def test_a_student_pools_as_its_own_files_say(found, projected, tmp_path):
    settings = {"max_length": 16, "pooling": "cls", "normalise": True}
    dump_teacher(dump_config("embedding", found, tmp_path / "cache", sequences=settings), progress=False)
    np.testing.assert_allclose(
        kdcache_vectors(projected, str(tmp_path / "cache")), kdcache_vectors(projected, found["cache"]), atol=1e-6
    )


def test_layers_can_be_left_out_of_a_student_with_a_projection(found, projected, tmp_path):
    run = train(found, tmp_path / "run", {"model": str(projected), "keep_layers": [1]}, max_steps=1)
    assert json.loads((run / "config.json").read_text())["num_hidden_layers"] == 1
    np.testing.assert_allclose(sentence_vectors(run), kdcache_vectors(run, found["cache"]), rtol=1e-4, atol=1e-6)


def test_another_width_without_a_remedy_is_refused(found, tmp_path):
    with pytest.raises(StudentError, match=r"width 16 and the student's 8, .*student\.projection.*student\.pca"):
        train(found, tmp_path / "run", {})
    assert not (tmp_path / "run").exists()
    objective = {"similarity_matrix": {"weight": 1.0}, "label_cosine": {"weight": 1.0, "label_scale": 8.0}}
    train(found, tmp_path / "run", {}, objective=objective, max_steps=2)


def test_settings_that_make_no_sense_are_refused(found, tmp_path):
    with pytest.raises(ConfigError, match="projection and pca exclude each other"):
        train(found, tmp_path / "run", {"projection": True, "pca": True})
    with pytest.raises(StudentError, match=r"pca: .* width 16, not more than the student's 16"):
        train(found, tmp_path / "run", {"model": found["student"], "pca": True})


def test_projections_are_for_embeddings(tmp_path):
    made = TINY_TASKS["sequence-regression"].write(tmp_path)
    dump_teacher(dump_config("sequence-regression", made, tmp_path / "cache"), progress=False)
    cache = open_cache(str(tmp_path / "cache"))
    with pytest.raises(ConfigError, match=r"student\.pca is for task embedding"):
        load_student(StudentConfig(model=made["student"], pca=True), cache.manifest, cache.tokenizer_dir())


def test_terms_about_pairs_want_a_cache_with_pairs(found, tmp_path):
    (tmp_path / "single.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in SENTENCES))
    made = {**found, "corpus": str(tmp_path / "single.jsonl")}
    dump_teacher(dump_config("embedding", made, tmp_path / "cache"), progress=False)
    with pytest.raises(ConfigError, match=r"objective\.contrastive compares pairs"):
        train(
            {**found, "cache": str(tmp_path / "cache")},
            tmp_path / "run",
            {"model": found["student"]},
            objective={"contrastive": {"weight": 1.0}},
        )


def test_a_module_that_cannot_be_run_is_refused(found, projected, tmp_path):
    import shutil

    shutil.copytree(projected, tmp_path / "odd")
    modules = json.loads((tmp_path / "odd" / "modules.json").read_text())
    modules.append({"idx": 4, "name": "4", "path": "4_LayerNorm", "type": "sentence_transformers.models.LayerNorm"})
    (tmp_path / "odd" / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(TeacherError, match="LayerNorm"):
        dump_teacher(
            dump_config("embedding", {**found, "teacher": str(tmp_path / "odd")}, tmp_path / "cache"), progress=False
        )
