"""Architectures whose answer depends on the padding of its batch: they answer as they answer each text alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers

from kdcache.errors import TeacherError
from kdcache.models import generation
from kdcache.models.bodies import split_for
from kdcache.models.padding import EqualLengths, without_padding
from kdcache.schema import OutputsRecord, Sequence
from kdcache.tasks import task_of
from kdcache.tasks.ranking import BI_ENCODER
from kdcache.teachers import HuggingFaceTeacher
from tests.loops import loop
from tests.task_models import bert, t5

VOCAB_SIZE, LENGTHS = 60, (11, 4, 7, 4, 16, 2, 7)
SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
BOTTLENECK = {"embedding_size": 16, "intra_bottleneck_size": 16, "true_hidden_size": 16}
LANDMARKS = {"num_landmarks": 4, "segment_means_seq_len": 4, "conv_kernel_size": 3}
FAMILIES = {
    "FNet": {"type_vocab_size": 4},
    "ConvBert": {"embedding_size": 16, "conv_kernel_size": 3, "head_ratio": 2},
    "Nystromformer": LANDMARKS,
    "Yoso": {},
}
PROPHETNET = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 16,
    "encoder_ffn_dim": 32,
    "num_encoder_layers": 1,
    "num_encoder_attention_heads": 2,
    "decoder_ffn_dim": 32,
    "num_decoder_layers": 1,
    "num_decoder_attention_heads": 2,
    "max_position_embeddings": 64,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 0,
}
EMBEDDED = OutputsRecord(width=16, pooling="mean", normalised=True)


def randomised(model: Any) -> Any:
    """Weights large enough that padding shows; those of a new model are not."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3)
    return model.eval()


def make(family: str, head: str, **more: Any) -> Any:
    config = getattr(transformers, f"{family}Config")(**SIZES, **more)
    return randomised(getattr(transformers, f"{family}{head}")(config))


def texts(*lengths: int) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.integers(5, VOCAB_SIZE, n).astype(np.uint32) for n in lengths]


def sequences(task: str) -> list[Sequence]:
    """Sequences of many lengths; those of encoder-decoders and of pairs have a second part of other lengths."""
    found = []
    for n, tokens in enumerate(texts(*LENGTHS)):
        ones, index = np.ones(1, np.uint8), np.arange(len(tokens), dtype=np.uint32)
        if task == "masked-lm":
            found.append(Sequence(n, tokens, np.ones(len(tokens), np.uint8), None, index.astype(np.int64), index))
            continue
        second = texts(*LENGTHS[::-1])[n]
        segments = np.repeat(np.arange(2, dtype=np.uint16), [len(tokens), len(second)])
        if task == "seq2seq-lm":
            ones = np.ones(len(second), np.uint8)
        if task == "causal-lm":
            found.append(Sequence(n, tokens, np.ones(len(tokens) - 1, np.uint8)))
            continue
        if task == "embedding":
            ones = np.ones(2, np.uint8)
        found.append(Sequence(n, np.concatenate([tokens, second]), ones, segments))
    return found


def in_one_batch_and_alone(teacher: HuggingFaceTeacher, task: str, layers: tuple[int, ...] = ()) -> Any:
    batch = sequences(task)
    together = teacher.run(batch, layers)
    logits, states = together.logits(0, len(together.labels_P)).clone(), dict(together.hidden)
    alone = []
    for sequence in batch:
        output = teacher.run([sequence], layers)
        alone.append((output.logits(0, len(output.labels_P)).clone(), output.hidden))
    expected = {layer: torch.cat([hidden[layer] for _, hidden in alone]) for layer in layers}
    return logits, torch.cat([found for found, _ in alone]), states, expected


CASES: list[tuple[str, Any]] = [
    *(("masked-lm", lambda f=f: make(f, "ForMaskedLM", **FAMILIES[f])) for f in FAMILIES),
    *(("embedding", lambda f=f: make(f, "Model", **FAMILIES[f])) for f in FAMILIES),
    *(
        ("sequence-classification", lambda f=f: make(f, "ForSequenceClassification", num_labels=3, **FAMILIES[f]))
        for f in FAMILIES
    ),
    ("embedding", lambda: make("MobileBert", "Model", **BOTTLENECK)),
    ("ranking", lambda: make("FNet", "ForSequenceClassification", num_labels=1, **FAMILIES["FNet"])),
    (
        "causal-lm",
        lambda: randomised(
            transformers.ProphetNetForCausalLM(transformers.ProphetNetConfig(**PROPHETNET, is_encoder_decoder=False))
        ),
    ),
    (
        "seq2seq-lm",
        lambda: randomised(
            transformers.ProphetNetForConditionalGeneration(transformers.ProphetNetConfig(**PROPHETNET))
        ),
    ),
]


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@loop("task, family", CASES, ids=[f"{task} {number}" for number, (task, _) in enumerate(CASES)])
def test_a_model_that_sees_padding_answers_in_a_batch_as_alone(task, family, caplog):
    caplog.clear()
    outputs = {"embedding": EMBEDDED, "ranking": OutputsRecord(width=1)}.get(task, OutputsRecord(width=3))
    teacher = HuggingFaceTeacher(family(), "odd", VOCAB_SIZE, None, task_of(task), outputs, "0" * 64)
    assert caplog.text.count("answers a text differently beside longer ones") == 1
    found, expected, _, _ = in_one_batch_and_alone(teacher, task)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
    assert teacher.sees_padding
    assert isinstance(teacher._body, EqualLengths)
    teacher._body = teacher._body.body
    padded, expected, _, _ = in_one_batch_and_alone(teacher, task)  # so the case shows what it is about
    assert (padded - expected).abs().max() > 1e-3


def test_states_of_layers_of_a_model_that_sees_padding():
    model = make("FNet", "ForMaskedLM", **FAMILIES["FNet"])
    teacher = HuggingFaceTeacher(model, "odd", VOCAB_SIZE, None, task_of("masked-lm"), None, "0" * 64)
    _, _, found, expected = in_one_batch_and_alone(teacher, "masked-lm", (0, 1, 2))
    for layer, states in expected.items():
        torch.testing.assert_close(found[layer], states, rtol=0, atol=2e-5)


@loop(
    "task, family",
    [
        ("masked-lm", lambda: randomised(bert("BertForMaskedLM", vocab_size=VOCAB_SIZE))),
        ("embedding", lambda: randomised(bert("BertModel", vocab_size=VOCAB_SIZE))),
        ("seq2seq-lm", lambda: randomised(t5())),
    ],
    ids=["masked-lm", "embedding", "seq2seq-lm"],
)
def test_other_models_run_as_they_are(task, family, caplog):
    caplog.clear()
    teacher = HuggingFaceTeacher(family(), "usual", VOCAB_SIZE, None, task_of(task), EMBEDDED, "0" * 64)
    assert not teacher.sees_padding
    assert not caplog.records
    found, expected, _, _ = in_one_batch_and_alone(teacher, task)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


class Sociable(transformers.BertModel):
    """Every text sees the mean of its batch."""

    def forward(self, input_ids: Any = None, attention_mask: Any = None, **kwargs: Any) -> Any:
        output = super().forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        output.last_hidden_state = output.last_hidden_state + output.last_hidden_state.mean(0, keepdim=True)
        return output


class Moody(transformers.BertModel):
    """The same text gets another answer each time."""

    def forward(self, input_ids: Any = None, attention_mask: Any = None, **kwargs: Any) -> Any:
        output = super().forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        output.last_hidden_state = output.last_hidden_state + torch.randn(1)
        return output


@pytest.mark.parametrize(
    ("family", "words"), [(Sociable, "answers a text differently beside other texts"), (Moody, "each time")]
)
def test_a_model_that_no_batches_make_exact_is_refused(family, words):
    model = randomised(family(bert("BertModel", vocab_size=VOCAB_SIZE).config))
    with pytest.raises(TeacherError, match=rf"odd \({family.__name__}\) .*{words}"):
        HuggingFaceTeacher(model, "odd", VOCAB_SIZE, None, task_of("embedding"), EMBEDDED, "0" * 64)


def test_students_learn_from_a_padded_batch_as_from_its_texts_alone():
    model = make("FNet", "ForMaskedLM", **FAMILIES["FNet"], hidden_dropout_prob=0.0)
    task = task_of("masked-lm")
    parts = split_for(task.body, model, None)
    body = without_padding(parts.body, model, "student", TeacherError)

    def gradient(batches: list[list[Sequence]]) -> torch.Tensor:
        model.zero_grad()
        for batch in batches:
            fed = {name: torch.from_numpy(array) for name, array in task.pad_batch(batch, 0).items()}
            rows = fed.pop("rows")
            states = body(**fed).last_hidden_state.flatten(0, 1)[rows]
            parts.head().logits(states).log_softmax(1)[:, 0].sum().backward()
        return model.get_input_embeddings().weight.grad.clone()

    batch = sequences("masked-lm")
    torch.testing.assert_close(gradient([batch]), gradient([[one] for one in batch]), rtol=1e-4, atol=1e-5)


def test_a_bi_encoder_embeds_each_text_as_alone(caplog):
    model = make("FNet", "Model", **FAMILIES["FNet"])
    around = {"around_one": [[1], [2]], "around_two": [[1], [2], [2]]}
    model.config.kdcache_bi_encoder = {"pooling": "mean", "similarity": "cosine", "scale": 1.0, **around}
    body = without_padding(split_for(BI_ENCODER.body, model, None).body, model, "student", TeacherError)
    assert "answers a text differently beside longer ones" in caplog.text

    def pair(first: np.ndarray, second: np.ndarray) -> Sequence:
        tokens = np.concatenate([[1], first, [2], second, [2]]).astype(np.uint32)
        segments = np.repeat(np.arange(2, dtype=np.uint16), [len(first) + 2, len(second) + 1])
        return Sequence(0, tokens, np.ones(1, np.uint8), segments)

    def scores(batch: list[Sequence]) -> torch.Tensor:
        fed = BI_ENCODER.pad_batch(batch, 0)
        return body(**{n: torch.from_numpy(a) for n, a in fed.items() if n != "rows"}).last_hidden_state.flatten()

    batch = [pair(*both) for both in zip(texts(*LENGTHS), texts(*LENGTHS[::-1]), strict=True)]
    with torch.no_grad():
        found, expected = scores(batch), torch.cat([scores([one]) for one in batch])
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


def test_texts_are_written_for_inputs_of_one_length_at_a_time(monkeypatch):
    batches = []

    def written(model: Any, tokenizer: Any, vocab_size: int, inputs: list[np.ndarray], **more: Any) -> list[int]:
        batches.append([len(tokens) for tokens in inputs])
        return batches[-1]

    monkeypatch.setattr(generation, "write_texts", written)
    for equal, expected in ((False, [[16, 11], [7, 7, 4, 4, 2]]), (True, [[16], [11], [7, 7], [4, 4], [2]])):
        batches.clear()
        settings = {"max_tokens": 4, "batch_tokens": 40, "equal_lengths": equal}
        found = generation.write_all(None, None, VOCAB_SIZE, texts(*LENGTHS), **settings)
        assert found == list(LENGTHS)
        assert batches == expected
