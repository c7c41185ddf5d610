from __future__ import annotations

import json
import sys

import peft
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, TrainerCallback

from kdcache.cache import open_cache
from kdcache.config import build
from kdcache.errors import ConfigError, StudentError
from kdcache.losses import Objective, ObjectiveConfig, TeacherRows
from kdcache.students import StudentConfig, load_student
from kdcache.torch_data import to_tensors
from kdcache.train import TrainConfig, preview_training
from kdcache.train.checkpoints import TERMS_FILE
from tests.tiny import bpe_tokenizer, llama, make_cache, random_sequences
from tests.train_runs import Recorder, settings, train

TOKENIZER = bpe_tokenizer()
VOCAB_SIZE = len(TOKENIZER)
IDS = torch.tensor([[5, 6, 7, 8, 9, 3, 2, 1]])
LORA = {"rank": 4, "alpha": 8.0}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    path = tmp_path_factory.mktemp("caches") / "cache"
    return make_cache(path, llama(VOCAB_SIZE, seed=5), TOKENIZER, random_sequences(12, VOCAB_SIZE, seed=1))


def untied_gpt2():
    torch.manual_seed(3)
    config = GPT2Config(
        vocab_size=VOCAB_SIZE, n_embd=16, n_layer=2, n_head=2, n_positions=64, tie_word_embeddings=False,
        initializer_range=0.3, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    models = {"tied llama": llama(VOCAB_SIZE, seed=2), "untied gpt2": untied_gpt2()}
    for name, model in models.items():
        model.save_pretrained(folder / name)
        TOKENIZER.save_pretrained(folder / name)
    return {name: folder / name for name in models}


@pytest.fixture(params=["tied llama", "untied gpt2"])
def base(request, bases):
    return bases[request.param]


def student_of(cache, base, *, seed=0, **lora):
    opened = open_cache(str(cache))
    config = build(StudentConfig, {"model": str(base), "seed": seed, "lora": {**LORA, **lora}})
    return load_student(config, opened.manifest, opened.tokenizer_dir())


def lora_settings(cache, base, output, **changes):
    return settings(cache, output, **{"student": {"model": str(base), "lora": LORA}, "learning_rate": 0.02, **changes})


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS).logits


# --------------------------------------------------------------------------------------------- the adapted model


def test_only_adapters_are_trained_and_the_start_is_the_base(cache, base):
    student, plain = student_of(cache, base), AutoModelForCausalLM.from_pretrained(base)
    assert torch.equal(logits(student.model), logits(plain)), "untrained adapters change nothing"
    trained = {name for name, p in student.model.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    assert student.num_parameters == plain.num_parameters()
    assert student.num_trainable_parameters == sum(
        p.numel() for name, p in student.model.named_parameters() if name in trained
    )


def test_all_linear_is_every_linear_layer_of_the_body_at_its_rank(cache, bases):
    student = student_of(cache, bases["tied llama"], rank=3)
    # Two layers, each with four projections of 16 x 16 and three of 16 x 32.
    assert student.num_trainable_parameters == 2 * (4 * 3 * (16 + 16) + 3 * 3 * (16 + 32))
    only = student_of(cache, bases["tied llama"], rank=3, target_modules=["q_proj", "layers.1.mlp.up_proj"])
    assert only.num_trainable_parameters == 2 * 3 * (16 + 16) + 3 * (16 + 32)


def test_the_seed_decides_the_adapters_and_the_global_generator_is_left_alone(cache, bases):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = student_of(cache, bases["tied llama"], seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    again, other = (student_of(cache, bases["tied llama"], seed=seed) for seed in (1, 2))
    a, b, c = (list(student.adapter.parameters()) for student in (first, again, other))
    assert all(map(torch.equal, a, b))
    assert not all(map(torch.equal, a, c))


class Shapes(TorchDispatchMode):
    """The shapes of all tensors that operations make, without views of others."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.made.append(tuple(tensor.shape))
        return out


@pytest.mark.parametrize("trains_head", [False, True])
def test_a_frozen_head_costs_no_gradient_of_its_size(cache, base, trains_head):
    student, opened = student_of(cache, base), open_cache(str(cache))
    weight = student.model.get_output_embeddings().weight
    weight.requires_grad_(trains_head)
    batch = to_tensors(opened.read([0, 1, 2]), student.pad_id)
    with Shapes() as shapes:
        hidden_PD = student.hidden(batch)
        objective = Objective(ObjectiveConfig(forward_kl={"weight": 1.0}))
        objective(hidden_PD, student.head, TeacherRows.from_batch(batch), batch["loss_mask"].sum()).loss.backward()
    assert (tuple(weight.shape) in shapes.made) == trains_head
    assert (weight.grad is not None) == trains_head
    assert all((p.grad is not None) for name, p in student.model.named_parameters() if "lora_" in name)


# ------------------------------------------------------------------------------------------- what a run leaves


def test_a_run_leaves_a_plain_merged_model_and_its_adapters(tmp_path, cache, base):
    recorder = Recorder(trained_only=True)
    train(lora_settings(cache, base, tmp_path / "out"), callbacks=[recorder])
    plain = AutoModelForCausalLM.from_pretrained(base)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(merged) is type(plain)
    assert merged.state_dict().keys() == plain.state_dict().keys()
    adapted = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "out" / "adapter")
    assert torch.allclose(logits(merged), logits(adapted), atol=1e-4)
    assert (logits(merged) - logits(plain)).abs().max() > 0.05, "it has learnt something"
    assert sorted(p.name for p in (tmp_path / "out" / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    record = json.loads((tmp_path / "out" / "kdcache_run.json").read_text())["student"]
    assert record["num_parameters"] == merged.num_parameters() > record["num_trainable_parameters"]
    assert record["num_trainable_parameters"] == sum(p.numel() for p in recorder.weights[0].values())
    frozen = {name for name in plain.state_dict() if "norm" in name or "ln_" in name or "embed" in name}
    assert frozen
    assert all(torch.equal(merged.state_dict()[name], plain.state_dict()[name]) for name in frozen)


def test_the_output_loads_where_peft_is_not_installed(tmp_path, cache, bases, monkeypatch):
    train(lora_settings(cache, bases["tied llama"], tmp_path / "out", max_steps=1))
    monkeypatch.setitem(sys.modules, "peft", None)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").num_parameters()


def test_the_optimiser_holds_only_the_adapters(tmp_path, cache, base):
    seen = []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, optimizer=None, **kwargs):
            seen.append({p.shape for group in optimizer.param_groups for p in group["params"]})
            assert all(p.requires_grad for group in optimizer.param_groups for p in group["params"])

    train(lora_settings(cache, base, tmp_path / "out", max_steps=1), callbacks=[Look()])
    assert all(4 in shape for shape in seen[0]), "each is as narrow as the rank"


# -------------------------------------------------------------------------------------------------- resuming


class Interrupt(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise KeyboardInterrupt


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, cache, base):
    changes = {
        "max_steps": 5,
        "save_steps": 2,
        "batch_sequences": 3,
        "gradient_checkpointing": True,
        "student": {"model": str(base), "lora": {**LORA, "dropout": 0.2}},
    }
    train(lora_settings(cache, base, tmp_path / "whole", **changes))
    part = lora_settings(cache, base, tmp_path / "part", **changes)
    with pytest.raises(KeyboardInterrupt):
        train(part, callbacks=[Interrupt()])
    saved = tmp_path / "part" / "checkpoint-2"
    assert (saved / "adapter_model.safetensors").stat().st_size < (base / "model.safetensors").stat().st_size
    assert not (saved / "model.safetensors").exists()
    assert train(part, resume=True).steps == 5
    for place in ("model.safetensors", "adapter/adapter_model.safetensors"):
        assert (tmp_path / "part" / place).read_bytes() == (tmp_path / "whole" / place).read_bytes()


def test_adapters_and_the_maps_of_hidden_states_are_trained_together(tmp_path, dumped):
    llama(VOCAB_SIZE + 22, seed=4, width=32).save_pretrained(tmp_path / "base")
    changes = {"objective": {"hidden_mse": {"weight": 1.0}}, "max_steps": 4, "save_steps": 1}
    recorder = Recorder(trained_only=True)
    train(lora_settings(dumped, tmp_path / "base", tmp_path / "whole", **changes), callbacks=[recorder])
    names = set(recorder.gradients[0])
    assert {name.split(".")[0] for name in names if "lora_" not in name} == {"terms"}
    assert all(gradient.abs().sum() > 0 for name, gradient in recorder.gradients[1].items() if "layers.0" in name)
    part = lora_settings(dumped, tmp_path / "base", tmp_path / "part", **changes)
    with pytest.raises(KeyboardInterrupt):
        train(part, callbacks=[Interrupt()])
    train(part, resume=True)
    for place in ("model.safetensors", "adapter/adapter_model.safetensors", TERMS_FILE):
        assert (tmp_path / "part" / place).read_bytes() == (tmp_path / "whole" / place).read_bytes()


def test_a_checkpoint_is_an_adapter_of_the_base(tmp_path, cache, base):
    recorder = Recorder(trained_only=True)
    train(lora_settings(cache, base, tmp_path / "out", save_steps=2), callbacks=[recorder])
    adapted = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), tmp_path / "out" / "checkpoint-2"
    )
    found = dict(adapted.base_model.model.named_parameters())
    assert all(torch.equal(found[name], value) for name, value in recorder.weights[2].items())


def test_a_run_whose_last_checkpoint_is_its_last_step_only_saves(tmp_path, cache, base):
    values = lora_settings(cache, base, tmp_path / "out", max_steps=2, save_steps=2)
    train(values)
    model, record = tmp_path / "out" / "model.safetensors", tmp_path / "out" / "kdcache_run.json"
    expected = model.read_bytes()
    record.write_text(json.dumps(json.loads(record.read_text()) | {"status": "running"}))
    model.unlink()
    train(values, resume=True)
    assert model.read_bytes() == expected


def test_a_dry_run_tells_what_is_trained_of_how_much(tmp_path, cache, base):
    student = student_of(cache, base)
    plan = preview_training(build(TrainConfig, lora_settings(cache, base, tmp_path / "out")))
    assert plan.num_parameters == AutoModelForCausalLM.from_pretrained(base).num_parameters()
    assert plan.num_trainable_parameters == student.num_trainable_parameters < plan.num_parameters


def test_resuming_with_other_adapters_is_refused(tmp_path, cache, base):
    train(lora_settings(cache, base, tmp_path / "out", max_steps=1))
    other = lora_settings(cache, base, tmp_path / "out", max_steps=1, student={"model": str(base), "lora": {"rank": 5}})
    with pytest.raises(ConfigError, match=r"student was .*rank"):
        train(other, resume=True)


# -------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("student", "match"),
    [
        ({"size": "nano", "lora": {}}, "lora needs model: a fresh student has no weights worth freezing"),
        ({"model": "x", "lora": {"rank": 0}}, "'student.lora.rank'.*greater than or equal to 1"),
        ({"model": "x", "lora": {"dropout": 1.0}}, "'student.lora.dropout'.*less than 1"),
        ({"model": "x", "lora": {"target_modules": "q_proj"}}, "expected 'all-linear' or a list of module names"),
        ({"model": "x", "lora": {"target_modules": []}}, "expected 'all-linear' or a list of module names"),
        ({"model": "x", "lora": {"rnk": 4}}, "unknown setting 'student.lora.rnk'; did you mean 'rank'"),
    ],
)
def test_settings_that_make_no_sense(tmp_path, student, match):
    with pytest.raises(ConfigError, match=match):
        build(TrainConfig, settings(tmp_path, tmp_path, student=student))


@pytest.mark.parametrize(
    ("targets", "match"),
    [
        (["q_proj", "v_porj"], "'v_porj' does not exist in student .*did you mean 'v_proj'"),
        (["mlp"], "'mlp' is not a linear layer"),
        (["lm_head"], "'lm_head' is the LM head or the embeddings"),
        (["q_proj", "embed_tokens"], "'embed_tokens' is the LM head or the embeddings"),
    ],
)
def test_target_modules_that_cannot_be_adapted(tmp_path, cache, bases, targets, match):
    values = lora_settings(
        cache, "", tmp_path / "out", student={"model": str(bases["tied llama"]), "lora": {"target_modules": targets}}
    )
    with pytest.raises(StudentError, match=match):
        train(values)
    assert not (tmp_path / "out").exists()


def test_without_peft_the_message_says_how_to_get_it(cache, bases, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"needs the package peft; install it with pip install 'kdcache\[lora\]'"):
        student_of(cache, bases["tied llama"])


def test_a_checkpoint_of_adapters_is_no_student(tmp_path, cache, bases):
    train(lora_settings(cache, bases["tied llama"], tmp_path / "out", max_steps=1, save_steps=1))
    place = tmp_path / "out" / "checkpoint-1"
    with pytest.raises(StudentError, match=r"checkpoint-1 holds adapters .*, no model"):
        train(settings(cache, tmp_path / "next", student={"model": str(place)}))
