"""Encoder-decoders: what a row is, what is cut, and every family of heads, offline as live."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from kdcache.cache import open_cache
from kdcache.cache.reader import Cache
from kdcache.config import build
from kdcache.dump import DumpConfig, dump_teacher
from kdcache.errors import ConfigError, CorpusError
from kdcache.models.bodies import split_for
from kdcache.models.lm_head import head_from_bytes
from kdcache.schema import OUTPUTS_FIELD, Sequence, layer_field
from kdcache.students import StudentConfig, load_student
from kdcache.tasks import task_of
from kdcache.torch_data import to_tensors
from kdcache.verify.stored import verify_cache
from tests.task_models import SENTENCES, t5, t5_tokenizer

TASK = task_of("seq2seq-lm")
EOS = 1
ROWS = [{"input": text, "target": SENTENCES[n - 1]} for n, text in enumerate(SENTENCES)]


def bart(*, seed: int = 1, width: int = 16) -> Any:
    """A BART of random weights whose head adds a bias that is no parameter, and that begins with EOS."""
    torch.manual_seed(seed)
    config = transformers.BartConfig(
        vocab_size=64,
        d_model=width,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=EOS,
        decoder_start_token_id=EOS,
        forced_eos_token_id=None,
        init_std=0.3,
        dropout=0.0,
    )
    model = transformers.BartForConditionalGeneration(config)
    model.final_logits_bias.normal_()
    return model


def untied_t5() -> Any:
    """A T5 whose head is its own, whatever its configuration says: that of transformers 5 always says tied."""
    model = t5(seed=1)
    model.lm_head.weight = torch.nn.Parameter(torch.randn(model.lm_head.weight.shape))
    return model


FAMILIES: dict[str, Callable[[], Any]] = {
    "T5": untied_t5,
    "T5, tied": lambda: t5(seed=1, tie=True),
    "BART": bart,
}
families = pytest.mark.parametrize("family", FAMILIES)


def write(path: Path, model: Any, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Write a teacher and a corpus; return the configuration of a dump that keeps everything exactly."""
    model.save_pretrained(path / "teacher")
    t5_tokenizer().save_pretrained(path / "teacher")
    (path / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "output": str(path / "cache"),
        "task": TASK.name,
        "teacher": {"model": str(path / "teacher"), "device": "cpu"},
        "corpus": {"paths": [str(path / "corpus.jsonl")]},
        "sequences": {"max_length": 32, "max_target_length": 16},
        "targets": {"top_k": len(t5_tokenizer()), "codec": "exact", "tail_prior": False},
        "batch_tokens": 64,
    }


def dump(config: dict[str, Any], **more: Any) -> Cache:
    """Dump ``config`` with some sections replaced."""
    dump_teacher(build(DumpConfig, {**config, **more}), progress=False)
    return open_cache(config["output"])


def logits_of(model: Any, sequence: Sequence) -> torch.Tensor:
    """What the model itself says of one sequence, alone and unpadded, over the tokenizer's ids."""
    of_target = np.asarray(sequence.segment_ids_T) == 1
    source, target = (
        torch.from_numpy(sequence.tokens_T[part].astype(np.int64))[None] for part in (~of_target, of_target)
    )
    fed = torch.cat([torch.tensor([[model.config.decoder_start_token_id]]), target[:, :-1]], 1)
    with torch.no_grad():
        output = model(input_ids=source, decoder_input_ids=fed, output_hidden_states=True)
    return output.logits[0, :, : len(t5_tokenizer())]


@families
def test_cache_holds_what_the_model_says_of_every_target(family: str, tmp_path: Path) -> None:
    model = FAMILIES[family]().eval()
    cache = dump(write(tmp_path, model, ROWS))
    assert verify_cache(str(tmp_path / "cache"), deep=True).problems == []
    for index in range(len(cache)):
        batch = cache[index]
        expected_PV = logits_of(model, batch.sequences()[0]).log_softmax(1)
        found_PV = torch.full_like(expected_PV, -torch.inf)
        targets = batch.targets
        found_PV.scatter_(1, torch.from_numpy(targets.ids_PK.astype(np.int64)), torch.from_numpy(targets.logprobs_PK))
        torch.testing.assert_close(found_PV, expected_PV, rtol=1e-4, atol=1e-4)


@families
def test_student_is_run_as_the_model_is(family: str, tmp_path: Path) -> None:
    model = FAMILIES[family]().eval()
    cache = dump(write(tmp_path, model, ROWS))
    student = load_student(StudentConfig(model=str(tmp_path / "teacher")), cache.manifest, cache.tokenizer_dir())
    batch = cache.read(range(len(cache)))
    tensors = to_tensors(batch, student.pad_id, TASK)
    with torch.no_grad():
        found_PV = student.head.logits(student.hidden(tensors))
    expected_PV = torch.cat([logits_of(model, sequence) for sequence in batch.sequences()])
    torch.testing.assert_close(found_PV, expected_PV, rtol=1e-4, atol=1e-4)


@families
@pytest.mark.parametrize("kind", ["sampled", "hybrid", "hidden"])
def test_every_kind_of_targets(family: str, kind: str, tmp_path: Path) -> None:
    model = FAMILIES[family]().eval()
    targets = {"kind": kind, **({"codec": "exact", "num_samples": 20} if kind != "hidden" else {})}
    cache = dump(
        write(tmp_path, model, ROWS), targets=targets, hidden_states={"codec": "fp16"} if kind == "hidden" else {}
    )
    assert verify_cache(str(tmp_path / "cache"), deep=True).problems == []
    batch = cache.read(range(len(cache)))
    expected_PV = torch.cat([logits_of(model, sequence) for sequence in batch.sequences()])
    if kind == "hidden":
        head = head_from_bytes(cache.lm_head_file()).narrow(cache.vocab_size)
        states_PD = torch.from_numpy(batch.hidden["last"])
        torch.testing.assert_close(head.logits(states_PD), expected_PV, rtol=1e-2, atol=2e-2)
        return
    logprobs_PV = expected_PV.log_softmax(1).numpy()
    samples = batch.targets.samples
    assert samples is not None
    if kind == "hybrid":
        found_PK = np.take_along_axis(logprobs_PV, batch.targets.ids_PK.astype(np.int64), 1)
        np.testing.assert_allclose(batch.targets.logprobs_PK, found_PK, rtol=1e-4, atol=1e-4)
        return
    # On average the log-probability of what is drawn is minus the entropy.
    sampled_PJ = np.take_along_axis(logprobs_PV, samples.ids_PJ.astype(np.int64), 1) * samples.counts_PJ
    assert (samples.counts_PJ.sum(1) == 20).all()
    entropy = -(np.exp(logprobs_PV) * logprobs_PV).sum(1).mean()
    assert -sampled_PJ.sum() / samples.counts_PJ.sum() == pytest.approx(entropy, rel=0.1)


@families
def test_hidden_states_are_the_decoders(family: str, tmp_path: Path) -> None:
    model = FAMILIES[family]().eval()
    cache = dump(write(tmp_path, model, ROWS), hidden_states={"layers": ["0", "1"], "codec": "fp16"})
    names = (layer_field(0), layer_field(1))
    batch = cache.read([2], fields=names)
    of_target = np.asarray(batch.sequences()[0].segment_ids_T) == 1
    tokens = torch.from_numpy(batch.tokens_T.astype(np.int64))
    fed = torch.cat([torch.tensor([model.config.decoder_start_token_id]), tokens[of_target][:-1]])[None]
    with torch.no_grad():
        output = model(input_ids=tokens[~of_target][None], decoder_input_ids=fed, output_hidden_states=True)
    for layer, name in enumerate(names):
        expected = output.decoder_hidden_states[layer][0].numpy()
        np.testing.assert_allclose(batch.hidden[name], expected, rtol=2e-3, atol=2e-3)
    assert OUTPUTS_FIELD not in cache.manifest.vector_fields


def test_ids_beyond_the_tokenizer_are_no_part_of_the_distribution(tmp_path: Path) -> None:
    model = t5(seed=1)
    with torch.no_grad():
        model.lm_head.weight[len(t5_tokenizer()) :] = 0
        model.lm_head.weight[:, 0] += 100 * (torch.arange(64) >= len(t5_tokenizer()))
    cache = dump(write(tmp_path, model, ROWS))
    batch = cache.read(range(len(cache)))
    assert batch.targets.ids_PK.max() < len(t5_tokenizer())
    np.testing.assert_allclose(np.exp(batch.targets.logprobs_PK).sum(1), 1, rtol=1e-5)


def sequences_of(tmp_path: Path, rows: list[dict[str, Any]], **settings: Any) -> tuple[Cache, list[str]]:
    """Dump ``rows``; return the cache and what each sequence says, with ``|`` before the target."""
    config = write(tmp_path, t5(seed=1), rows)
    cache = dump(config, sequences={**config["sequences"], **settings})
    texts = []
    for sequence in cache.read(range(len(cache))).sequences():
        of_target = np.asarray(sequence.segment_ids_T) == 1
        parts = [t5_tokenizer().convert_ids_to_tokens(sequence.tokens_T[part]) for part in (~of_target, of_target)]
        texts.append("|".join("".join(part).replace("▁", " ").strip() for part in parts))
    return cache, texts


def test_rows_without_input_or_target_are_left_out_and_counted(tmp_path: Path) -> None:
    rows = [
        {"input": "the cat", "target": "a dog"},
        {"input": "", "target": "a dog"},
        {"input": None, "target": "a dog"},
        {"input": "the dog", "target": None},
        {"input": "the dog", "target": ""},
        {"input": "the dog", "target": "  "},
        {"input": "the moon", "target": "the sun"},
    ]
    cache, texts = sequences_of(tmp_path, rows)
    assert texts == ["the cat</s>|a dog</s>", "the moon</s>|the sun</s>"]
    corpus = cache.manifest.corpus
    assert (corpus.num_documents, corpus.num_empty, corpus.num_too_short, corpus.num_truncated) == (7, 2, 3, 0)


def test_a_prefix_stands_before_every_input_and_is_no_input(tmp_path: Path) -> None:
    rows = [{"input": "the cat", "target": "a dog"}, {"input": "", "target": "a dog"}]
    cache, texts = sequences_of(tmp_path, rows, prefix="red ")
    assert texts == ["red the cat</s>|a dog</s>"]
    assert cache.manifest.corpus.num_empty == 1
    assert cache.manifest.sequences["prefix"] == "red "


def test_long_inputs_and_targets_are_cut_and_counted(tmp_path: Path) -> None:
    long = SENTENCES[7]
    rows = [
        {"input": "the cat", "target": "a dog"},
        {"input": long, "target": "a dog"},
        {"input": "a cat", "target": long},
    ]
    cache, texts = sequences_of(tmp_path, rows, max_length=8, max_target_length=6)
    assert cache.manifest.corpus.num_truncated == 2
    sources, targets = zip(*(text.split("|") for text in texts), strict=True)
    # An input ends as inputs do; a target that was cut does not pretend to be whole.
    assert all(source.endswith("</s>") for source in sources)
    assert [target.endswith("</s>") for target in targets] == [True, True, False]
    assert long.startswith(sources[1].removesuffix("</s>"))
    assert long.startswith(targets[2])
    lengths = [(int((np.asarray(s.segment_ids_T) == n).sum())) for s in cache.read([1, 2]).sequences() for n in (0, 1)]
    assert (lengths[0], lengths[3]) == (8, 6)


def test_a_target_that_is_no_text_is_an_error(tmp_path: Path) -> None:
    config = write(tmp_path, t5(seed=1), [{"input": "the cat", "target": ["a dog", "a sun"]}])
    with pytest.raises(CorpusError, match=r"document 0: expected a text as target, found list.*--column target=NAME"):
        dump(config)


@pytest.mark.parametrize("target", ["target", "summary"])
def test_a_corpus_without_targets_says_which_columns_there_are(target: str, tmp_path: Path) -> None:
    config = write(tmp_path, t5(seed=1), [{"input": "the cat", "body": "a dog"}])
    with pytest.raises(CorpusError, match=rf"no column '{target}'.*input, body"):
        dump(config, corpus={**config["corpus"], "columns": {"target": target}})


def test_columns_of_any_name(tmp_path: Path) -> None:
    config = write(tmp_path, t5(seed=1), [{"abstract": "the cat", "title": "a dog", "year": 3}])
    cache = dump(config, corpus={**config["corpus"], "columns": {"input": "abstract", "target": "title"}})
    assert cache.manifest.corpus.metadata_columns == ("year",)
    assert cache.metadata(0)["year"] == 3


def test_a_model_that_does_not_say_how_its_decoder_begins(tmp_path: Path) -> None:
    model = t5(seed=1)
    model.config.decoder_start_token_id = None
    model.generation_config.decoder_start_token_id = None
    with pytest.raises(ConfigError, match="decoder_start_token_id"):
        split_for(TASK.body, model, None)
    model.generation_config.decoder_start_token_id = 0
    assert split_for(TASK.body, model, None) is not None


def test_running_a_model_leaves_it_as_it_was() -> None:
    model = bart().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    parts = split_for(TASK.body, model, None)
    assert parts is not None
    tokens = torch.arange(6)[None]
    with torch.no_grad():
        parts.body(input_ids=tokens, target_ids=tokens)
        logits = model(input_ids=tokens, decoder_input_ids=tokens).logits
    assert logits.shape[-1] == 64
    assert {name: value.tolist() for name, value in model.state_dict().items()} == {
        name: value.tolist() for name, value in before.items()
    }


@families
def test_a_student_of_all_layers_is_the_model(family: str, tmp_path: Path) -> None:
    model = FAMILIES[family]().eval()
    cache = dump(write(tmp_path, model, ROWS))
    config = StudentConfig(model=str(tmp_path / "teacher"), keep_layers=(0, 1))
    student = load_student(config, cache.manifest, cache.tokenizer_dir())
    batch = cache.read([0, 1])
    with torch.no_grad():
        found_PV = student.head.logits(student.hidden(to_tensors(batch, student.pad_id, TASK)))
    expected_PV = torch.cat([logits_of(model, sequence) for sequence in batch.sequences()])
    torch.testing.assert_close(found_PV, expected_PV, rtol=1e-4, atol=1e-4)
