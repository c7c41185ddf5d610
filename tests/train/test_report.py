from __future__ import annotations

import contextlib
import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM

from kdcache.cache import open_cache
from kdcache.config import build
from kdcache.dump import DumpConfig, dump_teacher
from kdcache.students.sizes import SIZES, llama_config
from kdcache.train import TrainConfig, TrainingReport, preview_training, train_student
from kdcache.train.memory import AllocatedBytes, MemoryReport
from kdcache.train.timing import position_s
from tests.cli.conftest import run  # noqa: F401
from tests.tiny import bpe_tokenizer, llama, make_cache, random_sequences
from tests.train_runs import settings

ROOT = Path(__file__).parents[2]
TOKENIZER = bpe_tokenizer()
VOCAB_SIZE = len(TOKENIZER)


@pytest.fixture(scope="module")
def teacher():
    return llama(VOCAB_SIZE, seed=5)


@pytest.fixture(scope="module")
def cache_path(tmp_path_factory, teacher):
    sequences = random_sequences(24, VOCAB_SIZE, seed=1)
    return make_cache(tmp_path_factory.mktemp("cache") / "cache", teacher, TOKENIZER, sequences)


def report_of(cache, output, **changes) -> TrainingReport:
    return preview_training(build(TrainConfig, settings(cache, output, **changes)))


def by_name(report):
    return {term.name: term for term in report.terms}


# --------------------------------------------------------------------------------------------- what is measured


def test_losses_of_the_sample_are_those_of_student_and_teacher(tmp_path, cache_path, teacher):
    report = report_of(cache_path, tmp_path / "out")
    batch = open_cache(str(cache_path)).read(range(24))
    valid_P = torch.from_numpy(batch.loss_mask_P.astype(bool))
    torch.manual_seed(1)  # of the student
    student = AutoModelForCausalLM.from_config(
        llama_config(SIZES["nano"], VOCAB_SIZE, max_position_embeddings=2048, bos_token_id=0, eos_token_id=1)
    ).eval()
    for model, found in ((student, report.sample.student_loss), (teacher, report.sample.teacher_loss)):
        losses = []
        for first, last in zip(batch.token_offsets_N1[:-1], batch.token_offsets_N1[1:], strict=True):
            tokens = torch.from_numpy(batch.tokens_T[first:last].astype("int64"))
            with torch.no_grad():
                logprobs = model(input_ids=tokens[None, :-1]).logits[0].log_softmax(-1)
            losses.append(-logprobs.gather(1, tokens[1:, None])[:, 0])
        assert found == pytest.approx(float(torch.cat(losses)[valid_P].mean()), rel=1e-5)
    assert report.sample.num_positions == int(valid_P.sum())
    assert report.teacher_loss == pytest.approx(report.sample.teacher_loss, rel=1e-5), "the sample is everything"


@pytest.fixture(scope="module")
def kinds(tmp_path_factory, teacher_dir, corpus_file):
    """Caches of several kinds of targets from one teacher, with statistics and two layers of hidden states."""
    folder = tmp_path_factory.mktemp("kinds")
    targets = {
        "top-k": {"top_k": 6, "temperatures": [2.0]},
        "sampled": {"kind": "sampled", "num_samples": 20, "top_k": 0},
        "hidden": {"kind": "hidden", "top_k": 6},
    }
    for kind, values in targets.items():
        config = {
            "output": str(folder / kind),
            "teacher": {"model": str(teacher_dir), "device": "cpu"},
            "corpus": {"paths": [str(corpus_file)]},
            "sequences": {"max_length": 16},
            "targets": values,
            "hidden_states": {"layers": [1], "codec": "exact"} if kind == "top-k" else {},
        }
        dump_teacher(build(DumpConfig, config), progress=False)
    return folder


def test_every_term_has_the_value_that_the_first_step_logs(tmp_path, kinds):
    objective = {
        "forward_kl": {"weight": {"schedule": "linear", "start": 0.2, "end": 0.8}, "temperature": 2, "mode": "grid"},
        "reverse_kl": {"weight": 0.0},
        "cross_entropy": {"weight": 0.1, "select": {"by": "teacher_entropy", "top": 0.5}},
        "hidden_mse": {"weight": 0.5},
    }
    values = settings(kinds / "top-k", tmp_path / "out", batch_sequences=100, max_steps=2, objective=objective)
    report = preview_training(build(TrainConfig, values))
    train_student(build(TrainConfig, values), progress=False)
    first = json.loads((tmp_path / "out" / "kdcache_run.json").read_text())["history"][0]
    terms = by_name(report)
    assert set(terms) == set(objective)
    for name, term in terms.items():
        assert term.value == pytest.approx(first[name], rel=1e-4), name
        assert term.ms_per_1000_positions >= 0
        assert term.needs
    assert (terms["forward_kl"].weight, terms["forward_kl"].weight_end) == (0.2, 0.8)
    assert (terms["forward_kl"].mode, terms["forward_kl"].tail) == ("grid", "bucket")
    assert report.num_trainable_parameters > report.num_parameters, "the map between hidden states is trained too"


def test_kept_mass_at_the_temperature_of_each_loss(tmp_path, kinds):
    def mass(kind, **loss):
        report = report_of(kinds / kind, tmp_path / "out", objective={"forward_kl": {"weight": 1, **loss}})
        return report.terms[0].kept_mass, report.kept_mass

    batch = open_cache(str(kinds / "top-k")).read(range(5)).targets
    assert batch.log_tails_PG.shape[1] == 1
    at_one, statistics = mass("top-k")
    assert at_one == statistics
    softened, _ = mass("top-k", temperature=2, mode="grid")
    assert 0 < softened < at_one
    assert mass("top-k", temperature=2)[0] == at_one, "decoupled: the tail is compared at temperature 1"
    assert mass("hidden")[0] == 1.0
    kept, statistics = mass("hidden", mode="decoupled")
    assert kept == statistics < 1, "who asks for the kept ids gets no more of the vocabulary than these"
    assert mass("sampled")[0] is None


def test_what_a_term_needs_and_does_with_the_tail(tmp_path, kinds):
    terms = {
        kind: by_name(report_of(kinds / kind, tmp_path / "out"))["forward_kl"]
        for kind in ("top-k", "sampled", "hidden")
    }
    assert {kind: term.tail for kind, term in terms.items()} == {"top-k": "bucket", "sampled": None, "hidden": None}
    assert terms["hidden"].needs == "the teacher's last hidden state and LM head"
    assert "kept ids" in terms["top-k"].needs


def test_a_filter_restricts_all_of_the_report(tmp_path, kinds):
    whole = report_of(kinds / "top-k", tmp_path / "out")
    where = f"teacher_loss < {whole.teacher_loss}"
    part = report_of(kinds / "top-k", tmp_path / "out", where=where)
    assert 0 < part.sample.num_sequences == part.num_sequences < whole.num_sequences
    assert part.teacher_loss < whole.teacher_loss
    assert part.teacher_loss == pytest.approx(part.sample.teacher_loss, rel=1e-4)


def test_time_is_steps_times_time_of_a_step(tmp_path, cache_path):
    speed = report_of(cache_path, tmp_path / "out", max_steps=7).speed
    assert speed.eta_s == pytest.approx(7 * speed.step_s)
    assert 0 < speed.loss_share <= 1
    assert speed.tokens_per_s > 0


# ------------------------------------------------------------------------------------------------ memory


def test_allocated_bytes_are_counted_until_they_are_freed():
    weight = torch.nn.Parameter(torch.ones(100, 100))
    with AllocatedBytes() as memory:
        product = weight @ weight
        view = product.T[:5]
        assert (memory.live, memory.peak) == (40_000, 40_000)
        product.add_(1)
        other = product + 1
        assert memory.live == 80_000
        del product, view
        assert (memory.live, memory.peak) == (40_000, 80_000)
    del other


BIG = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 4, "num_attention_heads": 8}


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"batch_sequences": 64, "gradient_checkpointing": True}], ids=str)
def test_memory_is_about_what_a_run_takes(tmp_path, cache_path, changes):
    student = tmp_path / "student.json"
    student.write_text(json.dumps({"model_type": "llama", "tie_word_embeddings": True, **BIG}))
    values = settings(cache_path, tmp_path / "out", student={"config_file": str(student)}, **changes)
    files = [tmp_path / "warm.json", tmp_path / "run.json"]
    for file, content in zip(files, [settings(cache_path, tmp_path / "warm", max_steps=1), values], strict=True):
        file.write_text(json.dumps(content))
    command = [sys.executable, "-m", "tests.memory_probe", *map(str, files)]
    measured = int(subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout)
    estimated = preview_training(build(TrainConfig, values)).memory.total_bytes
    assert 1 / 1.3 < estimated / measured < 1.3


def test_memory_grows_with_the_micro_batch_and_shrinks_with_checkpointing(tmp_path, cache_path):
    def memory(**changes):
        return report_of(cache_path, tmp_path / "out", **changes).memory

    one, two, kept = memory(), memory(batch_sequences=16), memory(gradient_checkpointing=True)
    assert 1.8 < two.activations_bytes / one.activations_bytes < 2.2
    assert kept.activations_bytes < 0.7 * one.activations_bytes
    assert one.optimiser_bytes == 2 * one.gradients_bytes
    assert one.shards_bytes > 0
    apart = ("available_bytes", "process_bytes")
    assert one.total_bytes == sum(value for name, value in one if name.endswith("bytes") and name not in apart)
    assert one.process_bytes > 100 << 20, "an interpreter with torch, which a total of a few MB leaves out"


# --------------------------------------------------------------------------------------------- warnings


def test_memory_is_that_of_the_sequences_there_are(tmp_path, cache_path):
    def memory(**changes):
        return report_of(cache_path, tmp_path / "out", **changes).memory.activations_bytes

    assert memory(batch_sequences=10_000) == memory(batch_sequences=24)
    assert memory(batch_sequences=10_000, gradient_accumulation=3) == memory(batch_sequences=8)
    longest = int(open_cache(str(cache_path)).lengths_N.max())
    short = {"where": f"num_positions <= {longest // 2}", "batch_sequences": 2}
    assert memory(**short) < 0.7 * memory(batch_sequences=2)


def words(report):
    return "\n".join(report.warnings)


def test_no_warnings_where_all_is_well(tmp_path, teacher, cache_path):
    report = report_of(cache_path, tmp_path / "out")
    good = report.model_copy(
        update={
            "sample": report.sample.model_copy(update={"teacher_loss": 1.0}),
            "terms": tuple(term.model_copy(update={"kept_mass": 0.95}) for term in report.terms),
        }
    )
    assert good.warnings == ()


def test_a_teacher_that_is_no_better_than_the_student(tmp_path, cache_path):
    # Random tokens, which a teacher of strong opinions knows worse than a student of none.
    assert "the teacher's loss, " in words(report_of(cache_path, tmp_path / "out"))
    measured = {"cross_entropy": {"weight": 1}, "forward_kl": {"weight": 0}}
    alone = report_of(cache_path, tmp_path / "out", objective=measured)
    assert alone.warnings == ()


def test_a_student_worse_than_guessing(tmp_path, cache_path):
    model = llama(VOCAB_SIZE, seed=3)
    with torch.no_grad():
        model.model.norm.weight.mul_(20)
    model.save_pretrained(tmp_path / "student")
    TOKENIZER.save_pretrained(tmp_path / "student")
    report = report_of(cache_path, tmp_path / "out", student={"model": str(tmp_path / "student")})
    assert report.sample.student_loss > math.log(VOCAB_SIZE) + 1
    assert "is worse than that of guessing" in words(report)


def test_a_student_whose_loss_is_no_number(tmp_path, cache_path):
    report = report_of(cache_path, tmp_path / "out")
    broken = report.model_copy(update={"sample": report.sample.model_copy(update={"student_loss": math.nan})})
    assert "the student's loss at the start is nan" in words(broken)
    assert broken.to_dict()["sample"]["student_loss"] is None


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        ({"tail": "renormalise"}, "tail renormalise teaches that all other ids have none; use tail bucket"),
        ({"tail": "drop"}, "tail drop teaches"),
        ({}, "of the tail the student learns the total mass"),
        ({"weight": 0}, None),
    ],
)
def test_low_kept_mass(tmp_path, cache_path, loss, expected):
    objective = {"forward_kl": {"weight": 1, **loss}, "cross_entropy": {"weight": 1}}
    report = report_of(cache_path, tmp_path / "out", objective=objective)
    assert by_name(report)["forward_kl"].kept_mass < 0.5
    found = [warning for warning in report.warnings if warning.startswith("forward_kl:")]
    assert bool(found) == (expected is not None)
    if expected is not None:
        assert expected in found[0]


def test_a_selection_that_chooses_nothing(tmp_path, cache_path):
    def report(**select):
        objective = {"forward_kl": {"weight": 1, "select": select}, "cross_entropy": {"weight": 1}}
        return report_of(cache_path, tmp_path / "out", objective=objective)

    nothing, half = report(by="teacher_entropy", min=99), report(by="teacher_entropy", top=0.5)
    assert by_name(nothing)["forward_kl"].selected == 0
    assert "forward_kl: select chooses none" in words(nothing)
    # The sample is all of this cache.
    assert by_name(half)["forward_kl"].selected == pytest.approx(0.5, abs=0.01)
    assert by_name(half)["cross_entropy"].selected is None
    assert "select chooses none" not in words(half)


def test_a_run_that_does_not_fit(tmp_path, cache_path, monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    report = report_of(cache_path, tmp_path / "out", batch_sequences=64)
    assert not report.memory.fits
    assert "weights and optimiser alone do not fit" in words(report)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=5_000_000))
    assert "use a smaller batch_sequences" in words(report_of(cache_path, tmp_path / "out", batch_sequences=64))


def test_on_a_device_the_shards_do_not_count():
    memory = MemoryReport(
        device="cuda",
        weights_bytes=1,
        gradients_bytes=2,
        optimiser_bytes=4,
        activations_bytes=8,
        loss_bytes=16,
        shards_bytes=32,
        available_bytes=31,
    )
    assert memory.total_bytes == 31
    assert memory.fits


# ------------------------------------------------------------------------------------- a run, and what it prints


def dropout_student(tmp_path):
    file = tmp_path / "student.json"
    file.write_text(json.dumps({"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "resid_pdrop": 0.2}))
    return {"config_file": str(file)}


def test_a_run_with_a_report_is_the_same_run(tmp_path, kinds, capsys):
    values = {"student": dropout_student(tmp_path), "max_steps": 3, "batch_sequences": 4, "learning_rate": 1e-2}
    values["objective"] = {"forward_kl": {"weight": 1}, "hidden_mse": {"weight": 1}}
    for name in ("silent", "reported"):
        config = build(TrainConfig, settings(kinds / "top-k", tmp_path / name, **values))
        capsys.readouterr()
        train_student(config, progress=name == "reported")
        assert ("kept mass" in capsys.readouterr().err) == (name == "reported")
    silent, reported = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("silent", "reported")
    )
    assert all(torch.equal(value, reported[name]) for name, value in silent.items())


def test_the_report_of_a_run_ends_with_its_warnings(tmp_path, cache_path, capsys):
    train_student(build(TrainConfig, settings(cache_path, tmp_path / "out", max_steps=1)), progress=True)
    lines = [line for line in capsys.readouterr().err.splitlines() if "step/s" not in line]
    start = next(number for number, line in enumerate(lines) if line.startswith("teacher tiny-teacher: loss "))
    assert lines[start + 1].startswith("student LlamaForCausalLM")
    assert lines[start + 2].startswith("objective: 0.9 forward_kl (temperature 1, tail bucket), now ")
    assert lines[start + 3].startswith("1 step of about ")
    assert lines[start + 4].startswith("warning: the teacher's loss")


FIELDS = {
    *("student", "num_parameters", "num_trainable_parameters", "teacher", "num_sequences", "num_positions"),
    *("sequences_per_step", "tokens_per_step", "unit", "steps_per_epoch", "steps", "epochs", "learning_rate"),
    *(
        "objective",
        "output",
        "vocab_size",
        "teacher_loss",
        "kept_mass",
        "sample",
        "terms",
        "memory",
        "speed",
        "warnings",
    ),
}


def test_a_dry_run_of_the_command(run, tmp_path, cache_path):  # noqa: F811
    before = sorted(tmp_path.iterdir())
    options = ["--cache", cache_path, "--student-size", "nano", "--output", tmp_path / "out", "--device", "cpu"]
    outcome = run("train-student", *options, "--dry-run", "--json", "--quiet")
    data = json.loads(outcome.out, parse_constant=pytest.fail)
    assert outcome.code == 0
    assert set(data) == FIELDS
    assert {"total_bytes", "fits", "available_bytes"} < set(data["memory"])
    people = run("train-student", *options, "--dry-run", "--quiet")
    assert people.code == 0
    assert f"{data['num_parameters']:,} parameters" in people.out
    for name in ("forward_kl", "cross_entropy", "memory", "speed", "nothing was written"):
        assert name in people.out
    assert people.out.splitlines()[-1].startswith("warning: ")
    assert sorted(tmp_path.iterdir()) == before


def test_a_dry_run_of_several_processes_is_that_of_their_run(run, tmp_path, cache_path, monkeypatch):  # noqa: F811
    options = ["--cache", cache_path, "--student-size", "nano", "--output", tmp_path / "out", "--device", "cpu"]
    options += ["--batch-sequences", 4, "--dry-run", "--json", "--quiet"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    first = json.loads(run("train-student", *options).out)
    assert (first["sequences_per_step"], first["steps"]) == (8, 3)
    one_alone_s = first["tokens_per_step"] / first["speed"]["tokens_per_s"]
    assert first["speed"]["step_s"] < one_alone_s
    monkeypatch.setenv("RANK", "1")
    other = run("train-student", *options)
    assert (other.code, other.out) == (0, "")


def test_a_dry_run_counts_tokens_as_the_run_does():
    """Texts of seven tokens that have one position each, as for embeddings."""

    class OneParameter(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(()))

        def forward(self, batch, num_valid):
            return (self.weight * num_valid,)

    batch = {"labels": torch.zeros(2), "loss_mask": torch.ones(2), "attention_mask": torch.ones(2, 7)}
    seconds, tokens = position_s(OneParameter(), [batch, batch], contextlib.nullcontext)
    assert seconds > 0
    assert tokens == 7
