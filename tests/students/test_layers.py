from __future__ import annotations

import pytest
import torch
import transformers

from kdcache.config import build
from kdcache.errors import ConfigError, StudentError
from kdcache.students import StudentConfig
from kdcache.students.layers import with_layers
from tests.task_models import bert, t5
from tests.tiny import llama

IDS = torch.tensor([[5, 6, 7, 8]])


def test_a_bert_of_some_layers_runs_through_these_alone(tmp_path):
    model = bert("BertForMaskedLM", num_layers=4).eval()
    student = with_layers(model, (0, 3), "s")
    assert student.config.num_hidden_layers == 2
    hidden = model.bert.embeddings(IDS)
    for layer in (0, 3):
        hidden = model.bert.encoder.layer[layer](hidden)
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
    torch.testing.assert_close(student(IDS).logits, model.cls(hidden))
    student.save_pretrained(tmp_path)
    again = transformers.BertForMaskedLM.from_pretrained(tmp_path)
    torch.testing.assert_close(again(IDS).logits, student(IDS).logits)
    assert len({p.data_ptr() for p in student.parameters()} & {p.data_ptr() for p in model.parameters()}) == 0


def test_a_t5_loses_layers_of_both_halves_and_keeps_its_first():
    model = t5(num_layers=3).eval()
    student = with_layers(model, (0, 2), "s")
    assert (student.config.num_layers, student.config.num_decoder_layers) == (2, 2)
    assert torch.isfinite(student(input_ids=IDS, decoder_input_ids=IDS).logits).all()
    with pytest.raises(StudentError, match=r"does not work without .* Keep layer 0 too"):
        with_layers(model, (1, 2), "s")


def test_a_llama_still_generates():
    model = llama(40, num_hidden_layers=3).eval() if "num_hidden_layers" in llama.__code__.co_varnames else llama(40)
    num_layers = model.config.num_hidden_layers
    student = with_layers(model, (num_layers - 1,), "s")
    assert student.config.num_hidden_layers == 1
    assert student.generate(IDS % 40, max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (1, 7)


def test_layers_that_there_are_not_are_refused():
    with pytest.raises(ConfigError, match=r"keep_layers: student s has layers 0 to 1, found 2"):
        with_layers(bert("BertModel"), (0, 2), "s")
    with pytest.raises(ConfigError, match="keep_layers needs model: it chooses among the layers of a pretrained model"):
        build(StudentConfig, {"size": "tiny", "keep_layers": [0]})


@pytest.mark.parametrize("is_tied", [True, False])
def test_a_head_is_tied_if_the_models_own_was(is_tied):
    model = t5(num_layers=2).eval()
    head = model.get_output_embeddings()
    head.weight = model.get_input_embeddings().weight if is_tied else torch.nn.Parameter(3 * torch.randn(64, 16))
    student = with_layers(model, (0,), "s")
    torch.testing.assert_close(student.get_output_embeddings().weight, head.weight)
    torch.testing.assert_close(student.get_input_embeddings().weight, model.get_input_embeddings().weight)
    assert (student.get_output_embeddings().weight is student.get_input_embeddings().weight) is is_tied
