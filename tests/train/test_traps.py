"""One gradient, however a step is split: accumulation, padding, families, processes, checkpointing, adapters.

Every run here trains on the same four sequences a step, so each of its gradients has one true value: that of
`train_runs.live_loss` in float64, without padding, batches or caches, at the weights which the run had at that step.
The last tests do what kdcache must not: they show by how much the usual mistakes miss that value, and so that these
tests would notice.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch.func import functional_call
from transformers import AutoModelForCausalLM, CTRLConfig, CTRLLMHeadModel, Trainer, TrainerCallback, TrainingArguments

from kdcache.cache import open_cache
from kdcache.errors import ConfigError, StudentError
from kdcache.train.prepare import check_processes
from tests import families
from tests.tiny import bpe_tokenizer, llama, make_cache
from tests.train_runs import (
    Recorder,
    flat,
    live_loss,
    relative_difference,
    settings,
    train,
    train_distributed,
)

TOKENIZER = bpe_tokenizer()
VOCAB_SIZE = len(TOKENIZER)
FAMILIES = {"llama": llama, "gpt2": families.gpt2, "no kwargs": families.no_kwargs}
LORA = {"rank": 4, "alpha": 8.0}
TOP_K, KD_WEIGHT = 8, 0.7
OBJECTIVE = {"forward_kl": {"weight": KD_WEIGHT}, "cross_entropy": {"weight": 1 - KD_WEIGHT}}

#: Sequences per micro-batch and micro-batches: no padding to much of it, uneven micro-batches, empty ones.
SPLITS = [(4, 1), (1, 4), (2, 3), (1, 7)]
#: Runs are in float32; plain autograd in float32, over whole logits, misses the truth by up to 3e-6 here.
TOLERANCE = 1e-5


class World:
    """A teacher, its cache of four sequences of 55 positions, and pretrained students."""

    def __init__(self, folder):
        self.teacher = llama(VOCAB_SIZE, seed=5)
        generator = np.random.default_rng(0)
        self.sequences = [generator.integers(0, VOCAB_SIZE, n).astype(np.uint32) for n in (5, 28, 9, 17)]
        self.cache = make_cache(
            folder / "cache", self.teacher, TOKENIZER, self.sequences, top_k=TOP_K, num_shards=2, max_length=32
        )
        opened = open_cache(str(self.cache))
        self.masks = [opened.read([index]).loss_mask_P for index in range(len(self.sequences))]
        self.num_valid = int(sum(mask.sum() for mask in self.masks))
        self.students = {name: folder / name for name in FAMILIES}
        for name, directory in self.students.items():
            model = FAMILIES[name](VOCAB_SIZE)
            for dropout in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):  # of GPT-2: a gradient could not be repeated
                setattr(model.config, dropout, 0.0)
            model.save_pretrained(directory)
            TOKENIZER.save_pretrained(directory)

    def settings(self, output, *, family="llama", lora=False, batch=4, accumulation=1, **changes):
        student = {"model": str(self.students[family]), "lora": LORA if lora else None}
        split = {"batch_sequences": batch, "gradient_accumulation": accumulation}
        # The second step is at other weights (with adapters: the first at which both halves have a gradient).
        training = {"max_steps": 2, "learning_rate": 0.01, "objective": OBJECTIVE}
        return settings(self.cache, output, student=student, **split, **training, **changes)

    def truth(self, family, weights, *, kd_weight=KD_WEIGHT, only=slice(None)):
        """The gradient of the loss with respect to ``weights``, in float64; of some of the sequences on request."""
        model = AutoModelForCausalLM.from_pretrained(self.students[family]).double().train()
        trained = {name: value.double().requires_grad_() for name, value in weights.items()}

        def student(input_ids):
            return functional_call(model, effective(model, family, trained), kwargs={"input_ids": input_ids})

        given = (self.sequences[only], self.masks[only], TOP_K, kd_weight)
        loss = live_loss(student, self.teacher, *given)
        return dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))

    def check(self, family, gradients, weights):
        assert len(gradients) == 2
        for found, at in zip(gradients, weights, strict=True):
            expected = self.truth(family, at)
            assert relative_difference(found, expected) <= TOLERANCE
            assert norm(found) == pytest.approx(norm(expected), rel=TOLERANCE)


def effective(model, family, trained):
    """The weights that a model with ``trained`` ones computes with; adapters are multiplied out, W + alpha / r B A."""
    if not any("lora_" in name for name in trained):
        return trained
    changed = {}
    for name, a in trained.items():
        if ".lora_A." in name:
            delta = LORA["alpha"] / LORA["rank"] * trained[name.replace("lora_A", "lora_B")] @ a
            place = name.replace(".lora_A.default", "")
            # The layers of GPT-2 hold their weights transposed.
            changed[place] = model.get_parameter(place).detach() + (delta.T if family == "gpt2" else delta)
    return changed


def norm(gradient):
    return float(flat(gradient).norm())


def run(world, output, family, **changes):
    recorder = Recorder(trained_only=True)
    train(world.settings(output, family=family, **changes), callbacks=[recorder])
    return recorder


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("traps"))


# ------------------------------------------------------------------------------------------- the one true gradient


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("batch", "accumulation"), SPLITS)
def test_accumulation_padding_and_family(tmp_path, world, family, batch, accumulation):
    recorder = run(world, tmp_path / "out", family, batch=batch, accumulation=accumulation)
    world.check(family, recorder.gradients, recorder.weights)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lora", [False, True])
def test_gradient_checkpointing_and_adapters(tmp_path, world, family, lora):
    recorder = run(world, tmp_path / "out", family, batch=2, accumulation=3, lora=lora, gradient_checkpointing=True)
    assert any("lora_" in name for name in recorder.gradients[0]) == lora
    world.check(family, recorder.gradients, recorder.weights)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_adapters_alone(tmp_path, world, family):
    recorder = run(world, tmp_path / "out", family, batch=1, accumulation=4, lora=True)
    world.check(family, recorder.gradients, recorder.weights)


@pytest.mark.slow
def test_two_processes(tmp_path, world, preloaded):
    two = {
        # Of themselves they would not find each other here: the Trainer takes "no device named" for one process.
        "plain": {"family": "llama", "save_steps": 1, "device": "auto"},
        "no kwargs": {"family": "no kwargs"},
        "adapters": {"family": "gpt2", "lora": True},
        "both": {"family": "llama", "lora": True, "gradient_checkpointing": True},
        "checkpointing": {"family": "gpt2", "gradient_checkpointing": True},
        "not multiplied": {"family": "llama"},
    }
    # Two ranks of three micro-batches for four sequences: uneven, and one rank has an empty one.
    runs = {name: world.settings(tmp_path / name, batch=1, accumulation=3, **changes) for name, changes in two.items()}
    recorded = train_distributed(runs, tmp_path, preloaded, not_multiplied=["not multiplied"])
    trap = recorded.pop("not multiplied")
    for name, found in recorded.items():
        world.check(two[name]["family"], found["gradients"], found["weights"])
    half = {name: 2 * gradient for name, gradient in trap["gradients"][0].items()}
    assert relative_difference(half, world.truth("llama", trap["weights"][0])) <= TOLERANCE, "the trap: half of it"

    train(world.settings(tmp_path / "whole"))
    one, two = (json.loads((tmp_path / name / "kdcache_run.json").read_text()) for name in ("whole", "plain"))
    assert two["settings"]["sequences_per_step"] == 6
    for a, b in zip(one["history"], two["history"], strict=True):
        for name in ("loss", "forward_kl", "cross_entropy", "grad_norm"):
            assert a[name] == pytest.approx(b[name], rel=1e-4)
    for name in runs:
        AutoModelForCausalLM.from_pretrained(tmp_path / name)


@pytest.mark.parametrize(("started", "num_ranks"), [(None, 1), ("1", 1), ("2", 2), ("2", 1)])
def test_processes_that_would_each_train_alone(monkeypatch, started, num_ranks):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if started is not None:
        monkeypatch.setenv("WORLD_SIZE", started)
    if (started, num_ranks) != ("2", 1):
        check_processes(num_ranks)
        return
    with pytest.raises(ConfigError, match=r"2 processes were started, but .* each would train alone.*--device cpu"):
        check_processes(num_ranks)


# ----------------------------------------------------------------------------------------- gradient checkpointing


@pytest.mark.parametrize("is_on", [False, True])
def test_checkpointing_computes_layers_twice_only_where_it_is_on(tmp_path, world, is_on, monkeypatch):
    from transformers.models.llama.modeling_llama import LlamaMLP

    calls, forward = [], LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: (calls.append(self.training), forward(self, x))[1])
    run(world, tmp_path / "out", "llama", gradient_checkpointing=is_on)
    # Two layers, two steps.
    assert sum(calls) == (8 if is_on else 4)


def test_a_student_that_cannot_checkpoint_is_refused_before_training(tmp_path, world):
    torch.manual_seed(0)
    config = CTRLConfig(vocab_size=VOCAB_SIZE, n_embd=16, n_layer=1, n_head=2, dff=16, n_positions=64)
    CTRLLMHeadModel(config).save_pretrained(tmp_path / "ctrl")
    values = settings(
        world.cache, tmp_path / "out", student={"model": str(tmp_path / "ctrl")}, gradient_checkpointing=True
    )
    with pytest.raises(StudentError, match="the architecture CTRLLMHeadModel does not support it"):
        train(values)
    assert not (tmp_path / "out").exists()


def test_a_run_may_be_resumed_with_checkpointing_switched_on(tmp_path, world):
    class Interrupt(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    train(world.settings(tmp_path / "whole", save_steps=1))
    with pytest.raises(KeyboardInterrupt):
        train(world.settings(tmp_path / "part", save_steps=1), callbacks=[Interrupt()])
    train(world.settings(tmp_path / "part", save_steps=1, gradient_checkpointing=True), resume=True)
    whole, part = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "part"))
    assert all(torch.equal(part[name], whole[name]) for name in whole)


# ------------------------------------------------------------------------- what the usual mistakes would have given


class UsualTrainer(Trainer):
    """The stock Trainer with a loss of one's own: a mean, or a sum divided by what the Trainer has counted."""

    def __init__(self, *args, divide_by_count, **kwargs):
        super().__init__(*args, **kwargs)
        self.divide_by_count = divide_by_count

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        logits = model(**inputs).logits[:, :-1]
        count = num_items_in_batch if self.divide_by_count else None
        reduction = "mean" if count is None else "sum"
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction=reduction)
        return loss if count is None else loss / count


def usual_gradient(world, output, family, *, divide_by_count):
    """The gradient of one step of four micro-batches, and the weights at which it is."""
    data = []
    for tokens, mask in zip(world.sequences, world.masks, strict=True):
        labels = torch.from_numpy(tokens.astype(np.int64))
        labels[1:][torch.from_numpy(mask == 0)] = -100
        data.append({"input_ids": torch.from_numpy(tokens.astype(np.int64)), "labels": labels})
    model = AutoModelForCausalLM.from_pretrained(world.students[family])
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    found = []

    class Record(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            found.append({name: p.grad.clone() for name, p in model.named_parameters()})

    args = TrainingArguments(
        output_dir=str(output), per_device_train_batch_size=1, gradient_accumulation_steps=4, max_steps=1,
        max_grad_norm=0.0, use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no",
        remove_unused_columns=False,
    )  # fmt: skip
    trainer = UsualTrainer(
        model, args, train_dataset=data, callbacks=[Record()], divide_by_count=divide_by_count,
        data_collator=lambda rows: {name: torch.stack([row[name] for row in rows]) for name in rows[0]},
    )  # fmt: skip
    trainer.train()
    return found[0], weights


def scaled(gradient, factor):
    return {name: factor * value for name, value in gradient.items()}


def mean_of_means(world, family, weights):
    """The gradient of the mean over sequences of each one's mean over its positions."""
    parts = [world.truth(family, weights, kd_weight=0.0, only=slice(i, i + 1)) for i in range(4)]
    return {name: sum(part[name] for part in parts) / 4 for name in weights}


def test_trap_of_a_mean_per_micro_batch(tmp_path, world):
    """Nothing divides by the number of micro-batches, because the model's forward would take the count."""
    found, weights = usual_gradient(world, tmp_path, "llama", divide_by_count=False)
    assert relative_difference(found, scaled(mean_of_means(world, "llama", weights), 4)) <= TOLERANCE
    assert norm(found) > 4 * norm(world.truth("llama", weights, kd_weight=0.0))


def test_trap_of_a_model_without_kwargs(tmp_path, world):
    """The Trainer counts nothing for it, so what means to divide by the count takes means: short texts weigh more."""
    found, weights = usual_gradient(world, tmp_path, "no kwargs", divide_by_count=True)
    assert relative_difference(found, mean_of_means(world, "no kwargs", weights)) <= TOLERANCE
    assert relative_difference(found, world.truth("no kwargs", weights, kd_weight=0.0)) > 0.2


def test_trap_of_unshifted_labels(tmp_path, world):
    """GPT-2 names no loss type, so the Trainer counts the first token of every sequence too."""
    found, weights = usual_gradient(world, tmp_path, "gpt2", divide_by_count=True)
    truth = world.truth("gpt2", weights, kd_weight=0.0)
    assert relative_difference(found, scaled(truth, world.num_valid / (world.num_valid + 4))) <= TOLERANCE


def test_the_usual_way_is_right_where_it_counts_rightly(tmp_path, world):
    """So the three tests above measure the traps, not this file's own Trainer."""
    found, weights = usual_gradient(world, tmp_path, "llama", divide_by_count=True)
    assert relative_difference(found, world.truth("llama", weights, kd_weight=0.0)) <= TOLERANCE
