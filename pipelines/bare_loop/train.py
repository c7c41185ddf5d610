"""Distil a student without the Trainer: batches of the cache, the objective, and a PyTorch loop that is all yours.

    python pipelines/bare_loop/train.py CACHE OUTPUT --steps 1000

Started again after an interruption, it goes on at the exact next batch. With the same settings its weights are those
of kdcache train-student.
"""

import argparse
import math
import os
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch

import kdcache
from kdcache.config import build


def train(
    cache: str,
    output: str,
    *,
    student: dict[str, Any],
    objective: dict[str, Any],
    steps: int,
    batch_sequences: int = 8,
    accumulation: int = 1,
    learning_rate: float = 1e-3,
    warmup: float = 0.05,
    seed: int = 0,
    save_steps: int = 100,
    device: str = "cpu",
) -> None:
    """Train a student for ``steps`` and save it as a plain Hugging Face model under ``output``."""
    source = kdcache.open_cache(cache, max_open_shards=16)  # an epoch takes from 8 places, each between two shards
    learner = kdcache.load_student(build(kdcache.StudentConfig, student), source.manifest, source.tokenizer_dir())
    model = learner.model.to(device).train()
    loss_of = kdcache.Objective(build(kdcache.ObjectiveConfig, objective), context=kdcache.context_of(source))
    batches = kdcache.to_torch(source, batch_sequences, seed=seed, pad_id=learner.pad_id)

    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim < 2]  # norms and biases, which do not decay
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(rate_of, steps, math.ceil(warmup * steps)))

    parts = {"model": model, "optimizer": optimizer, "schedule": schedule, "batches": batches}
    checkpoint, step = Path(output, "checkpoint.pt"), 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, map_location=device)
        step = saved["step"]
        for name, part in parts.items():
            part.load_state_dict(saved[name])

    while step < steps:
        epoch = iter(batches)
        while step < steps and (micro_batches := list(islice(epoch, accumulation))):
            loss_of.progress = step / max(steps - 1, 1)
            # Of the whole step: a mean of the micro-batches' means would weigh short ones too much.
            num_valid = sum(batch["loss_mask"].sum() for batch in micro_batches).to(device)
            loss = torch.zeros((), device=device)
            for micro_batch in micro_batches:
                batch = {name: tensor.to(device) for name, tensor in micro_batch.items()}
                result = kdcache.StepInputs.of(learner, batch).loss(loss_of, learner, num_valid)
                result.loss.backward()
                loss += result.loss.detach()
            if not torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).isfinite():
                raise SystemExit(f"the run has diverged at step {step}: start anew with a lower learning rate")
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            step += 1
            if step % save_steps == 0 or step == steps:
                print(f"step {step}: loss {loss.item():.4f}, waited {batches.wait_s:.1f} s for data", flush=True)
                checkpoint.parent.mkdir(parents=True, exist_ok=True)
                torch.save({"step": step, **{n: part.state_dict() for n, part in parts.items()}}, f"{checkpoint}.part")
                os.replace(f"{checkpoint}.part", checkpoint)
    model.save_pretrained(output)
    learner.tokenizer.save_pretrained(output)


def rate_of(steps: int, warmup_steps: int, step: int) -> float:
    """Return the learning rate of ``step`` (from 0) as a share of its peak: a rise, then a cosine."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps  # from 0 on, the first step would do nothing
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, steps - warmup_steps)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache")
    parser.add_argument("output")
    parser.add_argument("--size", default="tiny", help="of a fresh student")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-sequences", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--device", default="cpu")
    settings = vars(parser.parse_args())
    try:
        train(student={"size": settings.pop("size")}, objective={}, **settings)
    except kdcache.KdcacheError as error:
        raise SystemExit(f"error: {error}") from None
