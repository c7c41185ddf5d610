from __future__ import annotations

import torch
import transformers

from kdcache.models.lm_head import LMHead, reproduces, split_model
from tests.families import SPLITTABLE, unsplittable
from tests.loops import loop
from tests.tiny import llama


@loop("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@loop("family", SPLITTABLE)
def test_body_and_head_give_the_models_logits(family, dtype):
    model = SPLITTABLE[family](40).to(dtype)
    split = split_model(model)
    assert split is not None
    body, head = split
    tokens = torch.randint(0, 40, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(input_ids=tokens).logits
        found = head.logits(body(input_ids=tokens).last_hidden_state)
    assert found.dtype == expected.dtype == dtype
    torch.testing.assert_close(found, expected, rtol=0, atol=8 * torch.finfo(dtype).eps * float(expected.abs().max()))
    assert head.vocab_size == 40


@loop("family", SPLITTABLE)
def test_logits_can_be_written_into_memory_that_is_there(family):
    _, head = split_model(SPLITTABLE[family](40))
    hidden = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    out = torch.full((5, 40), torch.nan)
    with torch.inference_mode():
        found = head.logits(hidden, out=out)
        torch.testing.assert_close(found, head.logits(hidden))


@loop("family", SPLITTABLE)
def test_a_narrow_head_never_sees_padding_rows(family):
    _, head = split_model(SPLITTABLE[family](40))
    hidden = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(head.narrow(33).logits(hidden), head.logits(hidden)[:, :33])
    assert head.narrow(33).weight_VD.data_ptr() == head.weight_VD.data_ptr()


def test_a_head_that_does_more_is_not_split():
    assert split_model(unsplittable(40)) is None


def test_a_model_without_a_head_is_not_split():
    assert split_model(llama(40).model) is None


@loop("training", [False, True])
def test_splitting_leaves_the_mode_alone(training):
    model = llama(40, attention_dropout=0.5).train(training)
    assert split_model(model) is not None
    assert model.training == training


def test_the_head_holds_the_models_own_parameters():
    model = llama(40)
    _, head = split_model(model)
    assert head.weight_VD is model.lm_head.weight
    assert head.weight_VD is model.model.embed_tokens.weight  # tied


def test_scale_bias_and_cap_are_applied_in_that_order():
    weight, bias = torch.eye(2), torch.tensor([1.0, 0.0])
    head = LMHead(weight, bias, scale=2.0, softcap=3.0)
    expected = 3 * torch.tanh(torch.tensor([[4.0, 4.0]]) / 3)
    torch.testing.assert_close(head.logits(torch.tensor([[1.0, 2.0]])), expected)


def test_a_soft_cap_of_another_name_is_read_or_the_split_is_refused():
    torch.manual_seed(0)
    config = transformers.RecurrentGemmaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        lru_width=32,
        logits_soft_cap=5.0,
        attention_window_size=16,
    )
    model = transformers.RecurrentGemmaForCausalLM(config).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(200)
    for dtype in (torch.float32, torch.bfloat16):
        split = split_model(model.to(dtype))
        assert split is not None
        assert split[1].softcap == 5.0
    uncapped = LMHead(model.get_output_embeddings().weight)
    assert not reproduces(model, model.base_model, uncapped, {}, {}), (
        "a cap that is not applied must be noticed in bfloat16"
    )
