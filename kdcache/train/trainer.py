"""The Hugging Face Trainer with one guarantee: the gradient of a step does not depend on how the step is split.

What the stock Trainer would do otherwise, and what is overridden:

- It counts labels to find the loss's denominator, wrongly for some models and not at all for those whose ``forward``
  takes no keyword arguments. Here the loss masks of all micro-batches and ranks are summed.
- Distributed data parallelism *averages* gradients over ranks, so the loss is multiplied by their number.
- Its samplers repeat or drop sequences at the end of an epoch, and accelerate re-shards them. Here `Batches` already
  yields this rank's share.
- It resumes by skipping through the batches that were used. Here the data begin at the sample that follows from the
  number of steps done.
- Several visible GPUs without a launcher would mean ``nn.DataParallel``, which splits a batch of flat positions inside
  sequences. Here one process uses one device.
- Checkpoints hold the *student* alone; the parameters of terms have a file of their own. A checkpoint appears under its
  name when it is complete (`kdcache.train.checkpoints`).
- It looks at the loss when it logs, and trains on with weights that are NaN. Here the loss and the norm of the gradient
  are checked before every update, and the answers of the student before it is saved.
- Its schedules begin with a learning rate of 0, which makes the first step do nothing. Here warm-up rises from
  1 / (its number of steps) and reaches the peak in its last step.

It trains any `Distiller`: ``forward(batch, num_valid)`` returns the loss, the sums of the terms and the number of valid
positions, so a distributed wrapper sees one forward, whatever the loss is made of.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from tqdm.auto import tqdm
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)

from kdcache.cache.batches import Batches
from kdcache.errors import StudentError
from kdcache.models.internals import use_one_gpu
from kdcache.models.trying import in_eval_mode
from kdcache.torch_data import count_tokens
from kdcache.train.checkpoints import (
    Checkpoints,
    check_finite,
    load_terms,
    load_weights,
    save_terms,
    save_weights,
)
from kdcache.train.module import Distiller


class DistillationTrainer(Trainer):
    """A Trainer over a `Distiller`, whose loader yields this rank's micro-batches."""

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        module: Distiller,
        args: TrainingArguments,
        batches: Batches[dict[str, Tensor]],
        **kwargs: Any,
    ) -> None:
        use_one_gpu(args)
        args.ignore_data_skip = True  # the batches begin where they should
        super().__init__(model=module, args=args, **kwargs)
        self.model_accepts_loss_kwargs = True
        self.student = module.student
        self._batches = batches
        self.meter = _Meter(batches)
        self.remove_callback(PrinterCallback)
        self.module = module
        self.checkpoints = Checkpoints(args.output_dir, keep=args.save_total_limit or 1)
        self._step = _Step()
        self._checked_step: int | None = None
        # Every version of the Trainer clips with it, and nothing else computes the norm.
        self.accelerator.clip_grad_norm_ = self._step.with_norm(self.accelerator.clip_grad_norm_)
        self.add_callback(_Flow(self, batches))

    def get_train_dataloader(self) -> Any:
        return self._batches

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor | None:
        if not batch_samples:
            return None  # of a resumed epoch, in which the Trainer asks as often as in a whole one
        count = torch.stack([batch["loss_mask"].sum() for batch in batch_samples]).sum().to(device)
        return self.accelerator.gather(count).sum() if self.args.world_size > 1 else count

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss, sums, count = model(inputs, num_items_in_batch)
        self.meter.add(sums, count, count_tokens(inputs))
        self._step.add(loss, inputs, count)
        loss = loss * self.accelerator.num_processes
        return (loss, sums) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # The Trainer also logs a summary at the end, which repeats earlier lines.
        if "loss" in logs:
            super().log({**logs, **self.meter.read(self.accelerator), **self.module.logged()}, start_time)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.lr_scheduler is None:  # type: ignore[has-type]
            share = partial(
                learning_rate_share,
                schedule=str(getattr(self.args.lr_scheduler_type, "value", self.args.lr_scheduler_type)),
                warmup_steps=self.args.get_warmup_steps(num_training_steps),
                num_steps=num_training_steps,
            )
            self.lr_scheduler = LambdaLR(self.optimizer if optimizer is None else optimizer, share)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def check_update(self) -> None:
        """Raise ``StudentError`` when the update that comes next would make the student useless."""
        loss, norm = self._step.end(self.module.parameters())
        if not (math.isfinite(loss) and math.isfinite(norm)):
            step = self.state.global_step + 1
            raise self._diverged(f"the loss at step {step} is {loss:.5g} and the norm of its gradient {norm:.5g}")

    def check_student(self) -> None:
        """Raise ``StudentError`` when the last update has made the student useless; nothing else is changed.

        No later step would notice: the gradient of a step is that before its update.
        """
        if self._checked_step == self.state.global_step:
            return
        check_finite(self.module, self._diverged)
        if self._step.batch is not None:
            with torch.no_grad(), in_eval_mode(self.module):
                loss = float(self.module(self._step.batch, self._step.num_valid)[0])
            if not math.isfinite(loss):
                raise self._diverged(f"after the update of step {self.state.global_step} the loss is {loss}")
        self._checked_step = self.state.global_step

    def _diverged(self, what: str) -> StudentError:
        before = self.checkpoints.newest()
        kept = "Nothing was saved" if before is None else f"The last student that was saved is in {before}"
        return StudentError(
            f"the run has diverged: {what}. {kept}. To resume would repeat these steps: begin a new run in another "
            "directory with a lower learning_rate, longer warm-up or smaller max_grad_norm"
            + ("" if before is None or self.student.adapter is not None else f", which may start from {before}")
        )

    @property
    def data_wait_s(self) -> float:
        """Seconds that this process has waited for data."""
        return self._batches.wait_s

    # ----------------------------------------------------------------------------------------------- checkpoints

    def _get_output_dir(self, trial: Any) -> str:
        """Return where the Trainer makes the directory of a checkpoint."""
        return str(self.checkpoints.partial)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.check_student()
        with self.checkpoints.writing(self.state.global_step):
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self.checkpoints.complete(self.state.global_step)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self.args.should_save:
            save_weights(self.student, output_dir or self.args.output_dir)
            save_terms(self.module, output_dir or self.args.output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_terms(self.module, resume_from_checkpoint)
        load_weights(self.student, resume_from_checkpoint)

    def load_checkpoint(self, checkpoint: Path, state: TrainerState) -> None:
        """Load the student and the state of the last checkpoint of a run that has made all its steps."""
        self._load_from_checkpoint(str(checkpoint))
        self.state = state


def learning_rate_share(step: int, *, schedule: str, warmup_steps: int, num_steps: int) -> float:
    """Return the learning rate of a step, counted from 0, as a share of its peak; it is positive for every step.

    It rises to the peak in the last of the ``warmup_steps``. The first step after them is at the peak too; from there
    on the schedules are those of Hugging Face: ``linear`` and ``cosine`` would be 0 one step after the last.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant_with_warmup":
        return 1.0
    num_falling = max(1, num_steps - warmup_steps)
    if schedule == "linear":
        return max(0.0, float(num_steps - step) / float(num_falling))
    progress = float(step - warmup_steps) / float(num_falling)
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))


class _Step:
    """Loss and gradient of the step in progress, and a micro-batch of the last step.

    They stay on the device until the gradient is complete, so that a step waits for the device once.
    """

    def __init__(self) -> None:
        self.batch: Mapping[str, Tensor] | None = None
        self.num_valid: Tensor | None = None
        self._loss: Tensor | None = None
        self._norm: Tensor | None = None

    def add(self, loss: Tensor, batch: Mapping[str, Tensor], num_valid: int) -> None:
        """Add the share of a micro-batch."""
        self._loss = loss.detach() if self._loss is None else self._loss + loss.detach()
        if num_valid:
            self.batch, self.num_valid = batch, batch["loss_mask"].sum()

    def with_norm(self, clip: Any) -> Any:
        """Return ``clip``, keeping the norm that it returns."""

        def clipped(*args: Any, **kwargs: Any) -> Any:
            self._norm = clip(*args, **kwargs)
            return self._norm

        return clipped

    def end(self, parameters: Iterable[Tensor]) -> tuple[float, float]:
        """Return the loss (of this process) and the norm of the gradient."""
        norm = self._norm
        if norm is None:  # some versions of the Trainer compute none without clipping
            norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        assert self._loss is not None
        loss, norm = self._loss.float(), torch.as_tensor(norm, device=self._loss.device).float()
        self._loss = self._norm = None
        found: list[float] = torch.stack([loss, norm]).tolist()
        return found[0], found[1]


class _Meter:
    """Sums of each loss term and of tokens since the last `read`; ``total_tokens`` since the beginning."""

    def __init__(self, batches: Batches[dict[str, Tensor]]) -> None:
        self.total_tokens = 0
        self._batches = batches
        self._reset()

    def _reset(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._num_valid = 0
        self._num_tokens: int | Tensor = 0
        self._since_s = time.perf_counter()
        self._waited_s = self._batches.wait_s

    def add(self, sums: Mapping[str, Tensor], num_valid: int, num_tokens: int | Tensor) -> None:
        """Add a micro-batch; sums stay on the device, so nothing waits for them."""
        for name, value in sums.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._num_valid += num_valid
        self._num_tokens = self._num_tokens + num_tokens

    def read(self, accelerator: Any) -> dict[str, float]:
        """Return each term's mean per valid position, tokens per second and ``data_wait``, and reset the sums.

        ``data_wait`` is the share of the time, 0 to 1, that this process waited for data.
        """
        names = list(self._sums)
        counts = [self._num_valid, float(self._num_tokens)]
        local = torch.tensor([*(self._sums[name].item() for name in names), *counts], dtype=torch.float64)
        total = accelerator.reduce(local.to(accelerator.device)) if accelerator.num_processes > 1 else local
        *sums, num_valid, num_tokens = total.tolist()
        self.total_tokens += int(num_tokens)
        seconds = max(time.perf_counter() - self._since_s, 1e-9)
        wait = (self._batches.wait_s - self._waited_s) / seconds
        self._reset()
        means = {name: value / max(num_valid, 1) for name, value in zip(names, sums, strict=True)}
        return {**means, "tokens_per_s": round(num_tokens / seconds, 1), "data_wait": round(wait, 5)}


class _Flow(TrainerCallback):
    """Set the next batch of the loader and the progress of the module, check every update, and log the last step.

    What is set follows from the number of steps done, so it is the same in a resumed run.
    """

    def __init__(self, trainer: DistillationTrainer, batches: Batches[dict[str, Tensor]]) -> None:
        self._trainer = trainer
        self._module = trainer.module
        self._batches = batches

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.check_update()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Those of a checkpoint would stay, and they may change when a run is resumed.
        state.save_steps, state.logging_steps = args.save_steps, args.logging_steps

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        dealt = self._batches.micro_batches
        epoch, step = divmod(state.global_step, dealt.steps_per_epoch)
        self._batches.load_state_dict({"epoch": epoch, "next_sample": step * dealt.sequences_per_step})

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._module.set_progress(state.global_step / max(state.max_steps - 1, 1))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # The Trainer counts the steps of a resumed epoch from its beginning.
        state.epoch = state.global_step / self._batches.micro_batches.steps_per_epoch
        if state.global_step >= state.max_steps:
            control.should_log = True


class ProgressBar(TrainerCallback):
    """A progress bar with the latest loss of every term."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            unit="step",
            dynamic_ncols=True,
            disable=not state.is_world_process_zero,
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._bar.update(state.global_step - self._bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        logs = logs or {}
        not_shown = ("epoch", "learning_rate", "grad_norm", "step", "tokens_per_s", "data_wait")
        shown = {name: f"{value:.4g}" for name, value in logs.items() if name not in not_shown}
        flow = {"tokens/s": f"{logs.get('tokens_per_s', 0):,.0f}", "data wait": f"{logs.get('data_wait', 0):.1%}"}
        self._bar.set_postfix(shown | flow)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._bar.close()
