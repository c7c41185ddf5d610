"""Dumps of real (tiny) Hugging Face models: what is stored equals what the whole model says, sequence by sequence."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from kdcache.cache import open_cache
from kdcache.codecs import TOPK_CODECS
from kdcache.config import build
from kdcache.dump import DumpConfig, dump_teacher, preview_dump
from kdcache.errors import CacheError, ConfigError, CorpusError, TeacherError
from kdcache.losses.from_cache import head_of
from kdcache.models.lm_head import head_to_bytes
from kdcache.models.loading import load_tokenizer
from kdcache.models.weights import weights_sha256
from kdcache.teachers import LogitsTeacher, TeacherConfig
from kdcache.transcode import TranscodeConfig, transcode_cache
from kdcache.verify.against_teacher import TeacherCheck, verify_against_teacher
from kdcache.verify.stored import verify_cache
from tests.families import SPLITTABLE
from tests.synthetic import targets_of
from tests.tiny import bpe_tokenizer, llama


def config_for(teacher_dir: Path, corpus_file: Path, output: Path, /, **changes: Any) -> DumpConfig:
    values = {
        "output": str(output),
        "teacher": {"model": str(teacher_dir), "device": "cpu"},
        "corpus": {"paths": [str(corpus_file)]},
        "sequences": {"max_length": 16},
        "targets": {"top_k": 6, "codec": "exact"},
        "shard_positions": 60,
        "batch_tokens": 64,
    }
    return build(DumpConfig, {**values, **changes})


def save_family(family: str, path: Path) -> Path:
    tokenizer = bpe_tokenizer()
    tokenizer.save_pretrained(path)
    SPLITTABLE[family](len(tokenizer) + 9).save_pretrained(path)
    return path


def save_teacher(config: Any, path: Path) -> None:
    """Save a causal LM of ``config`` with fixed random weights, and its tokenizer."""
    bpe_tokenizer().save_pretrained(path)
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(path)


def oracle(model: Any, tokens: np.ndarray, segments: np.ndarray | None) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits and all hidden states of one sequence; each document of a window by itself."""
    inputs = torch.from_numpy(tokens[:-1].astype(np.int64))
    sizes = [len(inputs)] if segments is None else np.unique(segments[:-1], return_counts=True)[1].tolist()
    outputs = [model(input_ids=piece[None], output_hidden_states=True) for piece in inputs.split(sizes)]
    states = [torch.cat([o.hidden_states[n][0] for o in outputs]) for n in range(len(outputs[0].hidden_states))]
    return torch.cat([o.logits[0] for o in outputs]), states


@torch.no_grad()
def check_cache(path: Path, teacher: Path, *, atol: float = 5e-5) -> None:
    cache = open_cache(str(path))
    model = transformers.AutoModelForCausalLM.from_pretrained(teacher)
    vocab_size = len(load_tokenizer(str(teacher)))
    assert cache.vocab_size == vocab_size < model.config.vocab_size
    names = cache.manifest.hidden_layers
    for index in range(len(cache)):
        batch = cache.read([index], fields=names)
        logits, states = oracle(model, batch.tokens_T, batch.segment_ids_T)
        labels = batch.tokens_T[1:].astype(int)
        expected = targets_of(logits[:, :vocab_size].numpy(), labels, cache.manifest.top_k)
        np.testing.assert_array_equal(batch.targets.ids_PK, expected.ids_PK)
        for name in ("logprobs_PK", "log_tail_P", "gold_logprob_P", "entropy_P"):
            np.testing.assert_allclose(getattr(batch.targets, name), getattr(expected, name), atol=atol, err_msg=name)
        for name in names:
            layer = int(name.removeprefix("hidden-"))
            np.testing.assert_allclose(batch.hidden[name], states[layer].numpy(), atol=atol, err_msg=name)


def test_the_shared_cache(dumped, teacher_dir):
    check_cache(dumped, teacher_dir)
    assert open_cache(str(dumped)).manifest.hidden_layers == ("hidden-1", "hidden-2")
    assert verify_cache(str(dumped), deep=True).problems == []


@pytest.mark.parametrize("packing", ["none", "window"])
@pytest.mark.parametrize("family", SPLITTABLE)
def test_targets_and_states_of_every_family(tmp_path, corpus_file, family, packing):
    teacher = save_family(family, tmp_path / "teacher")
    config = config_for(
        teacher,
        corpus_file,
        tmp_path / "cache",
        sequences={"max_length": 16, "packing": packing},
        hidden_states={"layers": "0,-2,last", "codec": "exact"},
    )
    dump_teacher(config, progress=False)
    check_cache(tmp_path / "cache", teacher)
    assert open_cache(config.output).manifest.hidden_layers == ("hidden-0", "hidden-1", "hidden-2")
    assert verify_cache(config.output, deep=True).problems == []


@pytest.mark.parametrize("batch_tokens", [1, 100, 100_000])
def test_any_batch_size_gives_the_same_targets(tmp_path, corpus_file, teacher_dir, batch_tokens):
    dump_teacher(config_for(teacher_dir, corpus_file, tmp_path, batch_tokens=batch_tokens), progress=False)
    check_cache(tmp_path, teacher_dir)


def test_documents_that_may_see_each_other(tmp_path, corpus_file, teacher_dir):
    packing = {"max_length": 16, "packing": "window", "attend_across_documents": True}
    dump_teacher(config_for(teacher_dir, corpus_file, tmp_path, sequences=packing), progress=False)
    check_cache(tmp_path, teacher_dir)  # every window is one text to the oracle too
    assert open_cache(str(tmp_path)).read([0]).segment_ids_T is None


def test_a_teacher_that_cannot_keep_documents_apart(tmp_path, corpus_file):
    tokenizer = bpe_tokenizer()
    tokenizer.save_pretrained(tmp_path / "bloom")
    config = transformers.BloomConfig(
        vocab_size=len(tokenizer), hidden_size=16, n_layer=2, n_head=2, initializer_range=0.3
    )
    transformers.BloomForCausalLM(config).save_pretrained(tmp_path / "bloom")
    packed = config_for(tmp_path / "bloom", corpus_file, tmp_path / "a", sequences={"packing": "window"})
    with pytest.raises(TeacherError, match="reads across the documents of a packed window"):
        dump_teacher(packed, progress=False)
    dump_teacher(config_for(tmp_path / "bloom", corpus_file, tmp_path / "b"), progress=False)


def test_a_bfloat16_teacher_agrees_with_itself(tmp_path, corpus_file, teacher_dir):
    config = config_for(teacher_dir, corpus_file, tmp_path, teacher={"model": str(teacher_dir), "dtype": "bfloat16"})
    manifest = dump_teacher(config, progress=False).manifest
    assert manifest.teacher.dtype == "bfloat16"
    assert verify_cache(str(tmp_path), deep=True).problems == []
    assert again(tmp_path, teacher_dir, 5).ok


# --------------------------------------------------------------------------------------------- the teacher again


def again(cache: Path, teacher_dir: Path, count: int = 5) -> TeacherCheck:
    return verify_against_teacher(
        open_cache(str(cache)), count, teacher=TeacherConfig(model=str(teacher_dir), device="cpu"), progress=False
    )


@pytest.mark.parametrize(
    ("codec", "dtype"),
    [
        *((name, "float32") for name in TOPK_CODECS),
        ({"name": "compact", "grid": 2}, "float32"),
        ("exact", "bfloat16"),
        ("exact", "float16"),
    ],
    ids=str,
)
def test_the_same_teacher_says_the_same_again(tmp_path, corpus_file, teacher_dir, codec, dtype):
    changes = {"targets": {"top_k": 16, "codec": codec}, "teacher": {"model": str(teacher_dir), "dtype": dtype}}
    dump_teacher(config_for(teacher_dir, corpus_file, tmp_path, **changes), progress=False)
    check = again(tmp_path, teacher_dir, 7)
    assert check.ok
    assert check.same_weights
    assert check.num_sequences == 7
    assert 0 <= check.mean_kl <= check.allowed_kl
    assert check.top1_agreement > 0.99
    assert check.mean_gold_difference <= check.allowed_gold_difference


def test_another_teacher_is_found_out(tmp_path, dumped, teacher_dir):
    load_tokenizer(str(teacher_dir)).save_pretrained(tmp_path)
    llama(len(bpe_tokenizer()) + 22, seed=2).save_pretrained(tmp_path)
    check = again(dumped, tmp_path)
    assert not check.ok
    assert not check.same_weights
    assert check.mean_gold_difference > 10 * check.allowed_gold_difference


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_right_weights_with_wrong_values_are_found_out(tmp_path, corpus_file, teacher_dir, monkeypatch, dtype):
    real = LogitsTeacher.answer

    def shifted(self, sequences, request):
        answer = real(self, sequences, request)
        rolled = {n: np.roll(v, 1, axis=0) for n, v in vars(answer.targets).items() if v is not None}
        return dataclasses.replace(answer, targets=dataclasses.replace(answer.targets, **rolled))

    monkeypatch.setattr(LogitsTeacher, "answer", shifted)
    teacher = {"model": str(teacher_dir), "dtype": dtype}
    dump_teacher(config_for(teacher_dir, corpus_file, tmp_path, teacher=teacher), progress=False)
    monkeypatch.undo()
    assert verify_cache(str(tmp_path), deep=True).ok  # each row makes sense by itself
    check = again(tmp_path, teacher_dir)
    assert check.same_weights
    assert not check.ok


SAMPLED = {"sampled": {"kind": "sampled"}, "hybrid": {"kind": "hybrid"}}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", SAMPLED)
def test_draws_are_checked_too(tmp_path, corpus_file, teacher_dir, kind, dtype):
    changes = {"targets": SAMPLED[kind], "teacher": {"model": str(teacher_dir), "dtype": dtype}}
    dump_teacher(config_for(teacher_dir, corpus_file, tmp_path, **changes), progress=False)
    check = again(tmp_path, teacher_dir, 7)
    assert check.ok
    assert check.samples_excess != 0
    assert abs(check.samples_excess) < check.allowed_samples_excess < 0.4
    if kind == "sampled":
        assert (check.mean_kl, check.top1_agreement) == (None, None)
    else:
        assert check.top1_agreement > 0.99


@pytest.mark.parametrize("kind", SAMPLED)
def test_draws_from_something_else_are_found_out(tmp_path, corpus_file, teacher_dir, monkeypatch, kind):
    import kdcache.teachers.reduce as keep

    real = keep.sample_ids
    monkeypatch.setattr(keep, "sample_ids", lambda weights_CV, uniforms_CN: real(weights_CV.sqrt(), uniforms_CN))
    changes = {"targets": {**SAMPLED[kind], "num_samples": 100}}
    dump_teacher(config_for(teacher_dir, corpus_file, tmp_path, **changes), progress=False)
    monkeypatch.undo()
    assert verify_cache(str(tmp_path), deep=True).ok
    check = again(tmp_path, teacher_dir, 20)
    assert check.samples_excess > check.allowed_samples_excess
    assert not check.ok


def test_draws_where_every_id_is_kept(tmp_path, corpus_file, teacher_dir):
    changes = {"targets": {"kind": "hybrid", "top_k": len(bpe_tokenizer())}}
    dump_teacher(config_for(teacher_dir, corpus_file, tmp_path, **changes), progress=False)
    check = again(tmp_path, teacher_dir)
    assert check.ok
    assert check.samples_excess == 0


def test_another_lm_head_is_found_out(tmp_path, corpus_file, teacher_dir):
    dump_teacher(config_for(teacher_dir, corpus_file, tmp_path, targets={"kind": "hidden"}), progress=False)
    assert again(tmp_path, teacher_dir).same_head is True
    cache = open_cache(str(tmp_path))
    head = head_of(cache)
    cache.lm_head_file = lambda: head_to_bytes(dataclasses.replace(head, weight_VD=head.weight_VD * 1.001))
    config = TeacherConfig(model=str(teacher_dir), device="cpu")
    check = verify_against_teacher(cache, 5, teacher=config, progress=False)
    assert check.same_head is False
    assert not check.ok


@pytest.mark.parametrize(
    "steps",
    [
        [{"codec": "exact"}],
        [{"codec": "fp16"}, {"codec": "exact"}],
        [{"codec": {"name": "compact", "grid": 2}}, {"codec": "exact", "top_k": 5}],
    ],
    ids=["one", "two", "coarse"],
)
def test_what_codecs_of_the_source_cost_is_allowed(tmp_path, corpus_file, teacher_dir, steps):
    config = config_for(teacher_dir, corpus_file, tmp_path / "0", targets={"top_k": 16, "codec": "compact"})
    dump_teacher(config, progress=False)
    for number, targets in enumerate(steps):
        places = {"source": str(tmp_path / str(number)), "output": str(tmp_path / str(number + 1))}
        transcode_cache(TranscodeConfig(**places, targets=targets), progress=False)
    check = again(tmp_path / str(len(steps)), teacher_dir, 7)
    assert check.mean_kl > 1.1e-5, "more than the last codec alone may cost"
    assert check.ok


def test_what_rounded_states_cost_is_allowed(tmp_path, corpus_file, teacher_dir):
    states = {"codec": "int8"}
    config = config_for(teacher_dir, corpus_file, tmp_path / "a", targets={"kind": "hidden"}, hidden_states=states)
    dump_teacher(config, progress=False)
    places = {"source": str(tmp_path / "a"), "output": str(tmp_path / "b"), "device": "cpu"}
    transcode_cache(TranscodeConfig(**places, targets={"kind": "top-k", "codec": "exact"}), progress=False)
    assert again(tmp_path / "b", teacher_dir, 7).ok


@pytest.mark.parametrize("count", [0, -1])
def test_no_sequences_to_check(dumped, teacher_dir, count):
    with pytest.raises(CacheError, match=f"at least one sequence has to be checked, found {count}"):
        again(dumped, teacher_dir, count)


def test_a_cache_that_names_no_place_of_its_teacher(dumped):
    with pytest.raises(TeacherError, match="say where the teacher is with --teacher"):
        verify_against_teacher(open_cache(str(dumped)), 1, progress=False)


def test_a_cache_names_no_path_of_this_machine(dumped):
    for path in dumped.rglob("*.json"):
        assert str(dumped.parent) not in path.read_text()
        assert "/tmp" not in path.read_text()


# ------------------------------------------------------------------------------------------------------ dry run


def test_a_dry_run_writes_nothing_and_tells_the_truth(tmp_path, corpus_file, teacher_dir):
    config = config_for(teacher_dir, corpus_file, tmp_path / "out")
    estimate = preview_dump(config, progress=False)
    assert not (tmp_path / "out").exists()
    manifest = dump_teacher(config, progress=False).manifest
    for name in ("num_sequences", "num_positions", "num_shards"):
        assert getattr(estimate, name) == getattr(manifest, name)
    assert estimate.num_documents == 10
    assert estimate.num_shards_committed == 0
    sums = manifest.statistics
    assert estimate.teacher_loss == pytest.approx(sums.teacher_loss_sum / sums.num_positions, rel=0.2)
    assert estimate.kept_mass == pytest.approx(sums.kept_mass_sum / sums.num_positions, rel=0.2)
    assert estimate.tokens_per_s > 0
    later = preview_dump(config, progress=False)
    assert later.num_shards_committed == manifest.num_shards
    assert later.eta_s == 0


# ------------------------------------------------------------------------------------------------------ mistakes


def test_nan_weights(tmp_path, corpus_file):
    tokenizer = bpe_tokenizer()
    tokenizer.save_pretrained(tmp_path / "teacher")
    model = llama(len(tokenizer))
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = torch.nan
    model.save_pretrained(tmp_path / "teacher")
    with pytest.raises(TeacherError, match=r"NaN or infinite .* \(sequence \d+, position 0\)"):
        dump_teacher(config_for(tmp_path / "teacher", corpus_file, tmp_path / "out"), progress=False)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"targets": {"top_k": 5000}}, ConfigError, "--top-k 5000 is more than the"),
        ({"teacher": {"model": "/no/such/model"}}, TeacherError, "there is no model at /no/such/model"),
        ({"corpus": {"paths": ["/no/such/corpus.txt"]}}, CorpusError, "/no/such/corpus.txt"),
        ({"hidden_states": {"layers": "3"}}, ConfigError, "no hidden state 3"),
        ({"teacher": {"model": "TEACHER", "dtype": "int3"}}, ConfigError, "unknown dtype 'int3'"),
        ({"teacher": {"model": "TEACHER", "device": "abacus"}}, ConfigError, "device 'abacus' cannot be used"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_mistakes_leave_no_output(tmp_path, corpus_file, teacher_dir, changes, error, words):
    if changes.get("teacher", {}).get("model") == "TEACHER":
        changes = {"teacher": {**changes["teacher"], "model": str(teacher_dir)}}
    with pytest.raises(error, match=words):
        dump_teacher(config_for(teacher_dir, corpus_file, tmp_path / "out", **changes), progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_sequences_longer_than_the_teachers_context_are_refused(tmp_path, corpus_file, family):
    # GPT-2 fails beyond its context with an index error, Llama answers badly without a word.
    teacher = save_family(family, tmp_path / "teacher")
    limit = transformers.AutoConfig.from_pretrained(teacher).max_position_embeddings
    path = tmp_path / "long.txt"
    path.write_text("the cat sat on the mat " * 2 * limit)
    config = config_for(teacher, path, tmp_path / "cache", sequences={"max_length": 4 * limit})
    with pytest.raises(ConfigError, match=rf"made for {limit}; use --max-length {limit}"):
        dump_teacher(config, progress=False)
    dump_teacher(config_for(teacher, path, tmp_path / "cache", sequences={"max_length": limit}), progress=False)


def test_short_texts_need_no_shorter_max_length(tmp_path, corpus_file, teacher_dir):
    path = tmp_path / "short.txt"
    path.write_text("the cat sat on the mat")
    dump_teacher(config_for(teacher_dir, path, tmp_path / "cache", sequences={"max_length": 512}), progress=False)


def test_a_last_state_of_another_width(tmp_path, corpus_file):
    config = transformers.OPTConfig(
        vocab_size=len(bpe_tokenizer()),
        hidden_size=16,
        word_embed_proj_dim=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        ffn_dim=32,
        max_position_embeddings=64,
    )
    save_teacher(config, tmp_path / "teacher")
    layers = {"layers": ["last", 1], "codec": "exact"}
    dump_teacher(
        config_for(tmp_path / "teacher", corpus_file, tmp_path / "cache", hidden_states=layers), progress=False
    )
    cache = open_cache(str(tmp_path / "cache"))
    batch = cache.read([0], fields=cache.manifest.hidden_layers)
    assert {name: states.shape[1] for name, states in batch.hidden.items()} == {"hidden-1": 16, "hidden-2": 8}
    assert verify_cache(str(tmp_path / "cache"), deep=True).problems == []


def test_a_mixture_of_experts_is_causal(tmp_path, corpus_file):
    config = transformers.MixtralConfig(
        vocab_size=len(bpe_tokenizer()),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=24,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    save_teacher(config, tmp_path / "teacher")
    dump_teacher(config_for(tmp_path / "teacher", corpus_file, tmp_path / "cache"), progress=False)


@pytest.mark.parametrize("mistake", ["top_k", "dtype", "output"])
def test_cheap_mistakes_show_before_anything_is_tokenised(tmp_path, corpus_file, teacher_dir, mistake, monkeypatch):
    def fail(*arguments, **settings):
        raise AssertionError("tokenised")

    monkeypatch.setattr("kdcache.tasks.causal_lm.plan_sequences", fail)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.doc").write_text("mine")
    changes = {
        "top_k": {"targets": {"top_k": 100_000}},
        "dtype": {"teacher": {"model": str(teacher_dir), "dtype": "float61"}},
        "output": {"output": str(tmp_path / "foreign")},
    }
    with pytest.raises((ConfigError, CacheError)):
        dump_teacher(config_for(teacher_dir, corpus_file, tmp_path / "cache", **changes[mistake]), progress=False)


def test_only_a_dry_run_remembers_the_hash_of_the_weights(tmp_path, corpus_file, teacher_dir, monkeypatch):
    calls = []
    for module in ("kdcache.models.weights", "kdcache.teachers.huggingface"):
        monkeypatch.setattr(f"{module}.weights_sha256", lambda model: calls.append(1) or weights_sha256(model))
    config = config_for(teacher_dir, corpus_file, tmp_path / "cache")
    preview_dump(config, progress=False)
    preview_dump(config, progress=False)
    assert len(calls) == 1
    dump_teacher(config, progress=False)
    assert len(calls) == 2
    preview_dump(config, progress=False)  # compares its plan with the one that is there
    assert len(calls) == 2
