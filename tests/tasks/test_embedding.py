"""Embedding: what becomes of texts and pairs, and how the teacher's states become vectors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from kdcache.cache import Cache, open_cache
from kdcache.dump import dump_teacher
from kdcache.errors import ConfigError, CorpusError, TeacherError
from kdcache.schema import OUTPUTS_FIELD
from tests.task_models import SENTENCES, TINY_TASKS, bert, bert_tokenizer, dump_config

ROWS: list[dict[str, Any]] = [
    {"text": "the cat sat", "text_pair": "a dog ran near the old house", "label": 2.5, "topic": "pets"},
    {"text": "the red moon"},
    {"text": ""},
    {"text": " ".join(["moon"] * 40), "text_pair": "", "label": "4"},
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return TINY_TASKS["embedding"].write(tmp_path_factory.mktemp("models"))


def dumped(models: dict[str, str], path: Path, rows: list[dict[str, Any]] = ROWS, **more: Any) -> Cache:
    path.mkdir(exist_ok=True)
    (path / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = dump_config("embedding", {**models, "corpus": str(path / "corpus.jsonl")}, path / "cache", **more)
    dump_teacher(config, progress=False)
    return open_cache(str(path / "cache"))


def vectors(cache: Cache) -> np.ndarray:
    return cache.read(range(len(cache)), fields=(OUTPUTS_FIELD,)).hidden[OUTPUTS_FIELD]


def states(directory: str, text: str, max_length: int = 16) -> torch.Tensor:
    encoded = bert_tokenizer()(text, truncation=True, max_length=max_length, return_tensors="pt")
    inputs = {name: encoded[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        return type(bert("BertModel")).from_pretrained(directory).eval()(**inputs).last_hidden_state[0]


def test_a_pair_is_one_sequence_with_a_row_for_each_text(models, tmp_path):
    cache = dumped(models, tmp_path)
    batch = cache.read(range(len(cache)))
    pair, single, long = batch.sequences()
    encode = bert_tokenizer()
    ids = [*encode("the cat sat")["input_ids"], *encode("a dog ran near the old house")["input_ids"]]
    assert pair.tokens_T.tolist() == ids
    assert pair.segment_ids_T.tolist() == [0] * 5 + [1] * 9
    assert pair.labels_L.tolist() == [2.5, 2.5]
    assert single.num_positions == 1
    assert np.isnan(single.labels_L[0])
    assert len(long.tokens_T) == 16
    assert long.tokens_T[-1] == encode.sep_token_id
    assert long.labels_L.tolist() == [4.0]
    assert (cache.manifest.corpus.num_empty, cache.manifest.corpus.num_truncated) == (1, 1)
    assert cache.sequence_table().column("topic").to_pylist() == ["pets", None, None]


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
@pytest.mark.parametrize("normalise", [True, False])
def test_vectors_are_the_pooled_states_of_each_text_alone(pooling, normalise, models, tmp_path):
    settings = {"max_length": 16, "pooling": pooling, "normalise": normalise, "prefix": "a "}
    cache = dumped(models, tmp_path, sequences=settings)
    assert (cache.manifest.outputs.pooling, cache.manifest.outputs.normalised) == (pooling, normalise)
    texts = [ROWS[0]["text"], ROWS[0]["text_pair"], ROWS[1]["text"], ROWS[3]["text"]]
    for vector, text in zip(vectors(cache), texts, strict=True):
        own = states(models["teacher"], "a " + text)
        expected = {"mean": own.mean(0), "cls": own[0], "last": own[-1]}[pooling]
        expected = nn.functional.normalize(expected, dim=0) if normalise else expected
        np.testing.assert_allclose(vector, expected.numpy(), rtol=1e-4, atol=1e-5)


def sentence_files(
    directory: Path, pooling: dict[str, Any], kinds: tuple[str, ...] = (), dense: dict[str, Any] | None = None
) -> None:
    paths = ["", "1_Pooling", *(f"{n}_{kind}" for n, kind in enumerate(kinds, 2))]
    names = ["Transformer", "Pooling", *kinds]
    modules = [
        {"idx": n, "name": str(n), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for n, (path, kind) in enumerate(zip(paths, names, strict=True))
    ]
    (directory / "modules.json").write_text(json.dumps(modules))
    for path, settings in (("1_Pooling", pooling), ("2_Dense", dense)):
        if settings is not None:
            (directory / path).mkdir()
            (directory / path / "config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize(
    ("settings", "kinds", "expected"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, ("Normalize",), ("cls", True)),
        ({"pooling_mode_lasttoken": True}, (), ("last", False)),
        ({"embedding_dimension": 16, "pooling_mode": "lasttoken"}, ("Normalize",), ("last", True)),
        ({"pooling_mode_mean_tokens": True}, (), ("mean", False)),
    ],
)
def test_pooling_is_read_from_the_files_of_the_teacher(settings, kinds, expected, tmp_path):
    models = TINY_TASKS["embedding"].write(tmp_path)
    sentence_files(tmp_path / "teacher", settings, kinds)
    outputs = dumped(models, tmp_path / "auto").manifest.outputs
    assert (outputs.pooling, outputs.normalised) == expected
    chosen = {"max_length": 16, "pooling": "mean", "normalise": True}
    outputs = dumped(models, tmp_path / "chosen", sequences=chosen).manifest.outputs
    assert (outputs.pooling, outputs.normalised) == ("mean", True)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"pooling_mode_max_tokens": True}, "pools by pooling_mode_max_tokens; expected one of mean, cls, last"),
        ({"pooling_mode_max_tokens": True, "pooling_mode_mean_tokens": True}, "pools by mean, pooling_mode_max_tokens"),
    ],
)
def test_a_pooling_that_there_is_not_is_refused(settings, words, tmp_path):
    models = TINY_TASKS["embedding"].write(tmp_path)
    sentence_files(tmp_path / "teacher", settings)
    with pytest.raises(TeacherError, match=words):
        dumped(models, tmp_path / "out")


def test_a_teacher_may_have_a_dense_layer(tmp_path):
    models = TINY_TASKS["embedding"].write(tmp_path)
    dense = {"in_features": 16, "out_features": 5, "bias": True}
    activation = {"activation_function": "torch.nn.modules.activation.Tanh"}
    sentence_files(tmp_path / "teacher", {"pooling_mode_mean_tokens": True}, ("Dense",), dense | activation)
    torch.manual_seed(0)
    linear = nn.Linear(16, 5)
    weights = {f"linear.{name}": value.detach() for name, value in linear.named_parameters()}
    save_file(weights, tmp_path / "teacher" / "2_Dense" / "model.safetensors")
    cache = dumped(models, tmp_path / "out")
    assert cache.manifest.outputs.width == 5
    with torch.no_grad():
        expected = torch.tanh(linear(states(models["teacher"], ROWS[1]["text"]).mean(0)))
    np.testing.assert_allclose(vectors(cache)[2], expected.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("codec", "error"), [("exact", 0), ("fp16", 4e-4), ("bf16", 4e-3), ("int8", 2e-2)])
def test_every_codec_keeps_the_vectors_to_its_precision(codec, error, models, tmp_path):
    exact = vectors(dumped(models, tmp_path / "exact"))
    found = vectors(dumped(models, tmp_path / "codec", outputs={"codec": codec}))
    relative = np.linalg.norm(found - exact, axis=1) / np.linalg.norm(exact, axis=1)
    assert relative.max() <= error
    assert codec == "exact" or relative.max() > 0


def test_mistakes_in_the_corpus_and_the_settings_are_told(models, tmp_path):
    with pytest.raises(CorpusError, match="expected a number as label, found 'alike'"):
        dumped(models, tmp_path / "label", [{"text": SENTENCES[0], "label": "alike"}])
    with pytest.raises(ConfigError, match="pooling"):
        dumped(models, tmp_path / "pooling", sequences={"pooling": "max"})
