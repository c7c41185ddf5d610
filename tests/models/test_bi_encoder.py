"""Bi-encoders against their two texts encoded alone, and as students from start to saved directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast

from kdcache.cache import Cache, open_cache
from kdcache.config import build
from kdcache.dump import DumpConfig, dump_teacher
from kdcache.errors import ConfigError
from kdcache.evaluate import evaluate_students
from kdcache.models.bi_encoder import BiEncoder, is_bi_encoder, mark_bi_encoder
from kdcache.models.pooling import pool
from kdcache.models.tokenizer import TextEncoder
from kdcache.students import StudentConfig, load_student
from kdcache.tasks import task_of
from kdcache.tasks.documents import joined
from kdcache.torch_data import to_tensors
from kdcache.train import TrainConfig, train_student
from tests.loops import loop
from tests.task_models import SENTENCES, TINY_TASKS, WORDS, bert, bert_tokenizer

QUERIES = ["the cat sat", "a big dog ran near"]
PAIRS = [(QUERIES[0], text) for text in SENTENCES[:3]] + [(QUERIES[1], text) for text in SENTENCES[2:7]]

#: Queries of the tiny corpus whose documents all fit beside the query, so that a pair loses nothing.
UNCUT = [0, 3, 1]


def roberta_tokenizer() -> PreTrainedTokenizerFast:
    """Whole words with RoBERTa's template, which has two tokens between a pair."""
    vocab = ["<s>", "<pad>", "</s>", "<unk>", *WORDS.split()]
    backend = Tokenizer(models.WordLevel({word: n for n, word in enumerate(vocab)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    names = {"bos_token": "<s>", "cls_token": "<s>", "eos_token": "</s>", "sep_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>", **names)


def roberta() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.RobertaConfig(
        vocab_size=len(roberta_tokenizer()),
        max_position_embeddings=40,
        initializer_range=0.3,
        type_vocab_size=1,
        **sizes,
    )
    return transformers.RobertaModel(config).eval()


FAMILIES = {"bert": (lambda: bert("BertModel").eval(), bert_tokenizer), "roberta": (roberta, roberta_tokenizer)}


def pair_inputs(tokenizer: Any, pairs: list[tuple[str, str]] = PAIRS) -> dict[str, torch.Tensor]:
    """Padded pairs as task ranking feeds them: token types tell query and document apart, whatever the model."""
    encoder = TextEncoder(tokenizer)
    made = [joined(encoder.encode_plain(list(pair)), encoder.around(2)) for pair in pairs]
    length = max(len(ids) for ids, _ in made)
    rows = [[*ids.tolist()] + [tokenizer.pad_token_id] * (length - len(ids)) for ids, _ in made]
    kinds = [[*kind.tolist()] + [0] * (length - len(kind)) for _, kind in made]
    real = [[1] * len(ids) + [0] * (length - len(ids)) for ids, _ in made]
    return {
        "input_ids": torch.tensor(rows),
        "attention_mask": torch.tensor(real),
        "token_type_ids": torch.tensor(kinds),
    }


def alone(model: Any, tokenizer: Any, text: str, pooling: str) -> torch.Tensor:
    """The vector of one text, fed by its tokenizer alone."""
    inputs = tokenizer(text, return_tensors="pt")
    states = model(input_ids=inputs["input_ids"]).last_hidden_state
    return pool(states, inputs["attention_mask"], pooling)[0]


@loop("family", FAMILIES)
@loop("pooling", ["mean", "cls", "last"])
@loop("similarity", ["cosine", "dot"])
def test_scores_are_those_of_the_texts_alone(family: str, pooling: str, similarity: str) -> None:
    make, make_tokenizer = FAMILIES[family]
    model, tokenizer = make(), make_tokenizer()
    mark_bi_encoder(model, tokenizer, {"pooling": pooling, "similarity": similarity, "scale": 3.0})
    scores = BiEncoder(model)(**pair_inputs(tokenizer)).last_hidden_state
    assert scores.shape == (len(PAIRS), 1, 1)
    expected = []
    for query, document in PAIRS:
        q, d = (alone(model, tokenizer, text, pooling) for text in (query, document))
        expected.append(3.0 * (torch.cosine_similarity(q, d, dim=0) if similarity == "cosine" else q @ d))
    torch.testing.assert_close(scores[:, 0, 0], torch.stack(expected), rtol=1e-4, atol=1e-5)


def test_a_query_is_fed_once() -> None:
    model, tokenizer = bert("BertModel").eval(), bert_tokenizer()
    mark_bi_encoder(model, tokenizer, {})
    batches: list[int] = []
    model.register_forward_pre_hook(lambda _, __, named: batches.append(len(named["input_ids"])), with_kwargs=True)
    BiEncoder(model)(**pair_inputs(tokenizer))
    assert batches == [len(QUERIES), len(PAIRS)]


def test_scores_of_a_model_in_bfloat16_are_in_float32() -> None:
    model, tokenizer = bert("BertModel").eval(), bert_tokenizer()
    mark_bi_encoder(model, tokenizer, {})
    exact = BiEncoder(model)(**pair_inputs(tokenizer)).last_hidden_state
    coarse = BiEncoder(model.bfloat16())(**pair_inputs(tokenizer)).last_hidden_state
    assert coarse.dtype == torch.float32
    torch.testing.assert_close(coarse, exact, rtol=0, atol=0.5)  # of cosines times 20


def test_an_empty_document_has_a_score() -> None:
    model, tokenizer = bert("BertModel").eval(), bert_tokenizer()
    mark_bi_encoder(model, tokenizer, {})
    scores = BiEncoder(model)(**pair_inputs(tokenizer, [("the cat", "the dog"), ("the cat", "")])).last_hidden_state
    assert scores.isfinite().all()
    assert scores[0] != scores[1]


# ------------------------------------------------------------------------------------------------------- as students


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A cache of task ranking, and an encoder without any head."""
    path = tmp_path_factory.mktemp("bi-encoder")
    tiny = TINY_TASKS["ranking"]
    places = tiny.write(path) | {"cache": str(path / "cache"), "encoder": str(path / "encoder")}
    bert("BertModel", width=8, num_layers=1, seed=4).save_pretrained(path / "encoder")
    bert_tokenizer().save_pretrained(path / "encoder")
    config = {
        "output": places["cache"],
        "task": "ranking",
        "teacher": {"model": places["teacher"], "device": "cpu"},
        "corpus": {"paths": [places["corpus"]]},
        "sequences": tiny.settings,
    }
    dump_teacher(build(DumpConfig, config), progress=False)
    return places


def scores_of(run: str, cache: Cache) -> torch.Tensor:
    student = load_student(StudentConfig(model=run), cache.manifest, cache.tokenizer_dir())
    with torch.no_grad():
        return student.hidden(to_tensors(cache.read(UNCUT), student.pad_id, task_of("ranking")))


def train_config(found: dict[str, str], output: Path, **more: Any) -> TrainConfig:
    settings = {
        "cache": found["cache"],
        "student": {"model": found["encoder"], "encoder": "bi-encoder", "bi_encoder": {"scale": 5}},
        "output": str(output),
        "max_steps": 30,
        "learning_rate": 0.01,
        "batch_sequences": 4,
        "save_steps": 10,
    }
    return build(TrainConfig, settings | more)


@pytest.fixture(scope="module")
def run(found: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """A finished run of a bi-encoder."""
    output = tmp_path_factory.mktemp("run") / "out"
    train_student(train_config(found, output), progress=False)
    return str(output)


def test_a_bi_encoder_learns_the_teachers_order(found: dict[str, str], run: str, tmp_path: Path) -> None:
    train_student(train_config(found, tmp_path / "start", max_steps=1, learning_rate=1e-9), progress=False)
    before, after = evaluate_students(
        found["cache"], [str(tmp_path / "start"), run], device="cpu", progress=False
    ).students
    assert after.metrics["teacher_spearman"] > before.metrics["teacher_spearman"] + 0.2


def test_the_run_says_itself_that_it_is_a_bi_encoder(found: dict[str, str], run: str) -> None:
    assert is_bi_encoder(AutoConfig.from_pretrained(run))
    cache = open_cache(found["cache"])
    student = load_student(StudentConfig(model=run), cache.manifest, cache.tokenizer_dir())
    assert isinstance(student.parts.body, BiEncoder)
    assert student.model.config.kdcache_bi_encoder["scale"] == 5
    assert scores_of(run, cache).abs().max() <= 5


def test_sentence_transformers_gives_the_same_scores(found: dict[str, str], run: str) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    model = sentence_transformers.SentenceTransformer(run, device="cpu")
    rows = [json.loads(line) for line in Path(found["corpus"]).read_text().splitlines()]
    expected = torch.cat(
        [5 * model.similarity(model.encode(rows[n]["query"]), model.encode(rows[n]["documents"]))[0] for n in UNCUT]
    )
    torch.testing.assert_close(scores_of(run, open_cache(found["cache"]))[:, 0], expected, rtol=1e-4, atol=1e-4)


def test_a_resumed_run_ends_as_the_uninterrupted_one(found: dict[str, str], run: str, tmp_path: Path) -> None:
    class Stop(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 15:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_student(train_config(found, tmp_path / "out"), progress=False, callbacks=[Stop()])
    train_student(train_config(found, tmp_path / "out"), resume=True, progress=False)
    expected, mine = (AutoModel.from_pretrained(path).state_dict() for path in (run, tmp_path / "out"))
    for name, tensor in expected.items():
        torch.testing.assert_close(mine[name], tensor, rtol=1e-5, atol=1e-6)


def test_what_is_not_said_again_stays(found: dict[str, str], run: str) -> None:
    cache = open_cache(found["cache"])
    config = build(StudentConfig, {"model": run, "encoder": "bi-encoder", "bi_encoder": {"similarity": "dot"}})
    saved = load_student(config, cache.manifest, cache.tokenizer_dir()).model.config.kdcache_bi_encoder
    assert (saved["similarity"], saved["scale"]) == ("dot", 5)


def test_a_cross_encoder_can_begin_from_a_bi_encoder(found: dict[str, str], run: str) -> None:
    cache = open_cache(found["cache"])
    config = StudentConfig(model=run, encoder="cross-encoder")
    student = load_student(config, cache.manifest, cache.tokenizer_dir())
    assert student.model.config.num_labels == 1
    assert not is_bi_encoder(student.model.config)


def test_a_fresh_bi_encoder(found: dict[str, str]) -> None:
    cache = open_cache(found["cache"])
    config = StudentConfig(config_file=found["student"], encoder="bi-encoder")
    student = load_student(config, cache.manifest, cache.tokenizer_dir())
    assert isinstance(student.model, transformers.BertModel)
    assert isinstance(student.parts.body, BiEncoder)


def test_hidden_state_terms_say_that_there_are_none(found: dict[str, str]) -> None:
    from kdcache.errors import StudentError

    cache = open_cache(found["cache"])
    config = StudentConfig(model=found["encoder"], encoder="bi-encoder")
    student = load_student(config, cache.manifest, cache.tokenizer_dir())
    with pytest.raises(StudentError, match="does not return the states of its layers"):
        student.layer_widths()


def test_settings_that_do_not_fit_are_refused(found: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="bi_encoder needs encoder: bi-encoder"):
        build(StudentConfig, {"model": "x", "bi_encoder": {"scale": 2}})
    cache = open_cache(found["cache"])
    manifest = cache.manifest.model_copy(update={"task": "sequence-regression"})
    with pytest.raises(ConfigError, match=r"student\.encoder is bi-encoder.* task sequence-regression"):
        load_student(StudentConfig(model=found["encoder"], encoder="bi-encoder"), manifest, cache.tokenizer_dir())
