"""Prepare a run for training, for a dry run or for a sweep: cache, student, objective, order, checks."""

from __future__ import annotations

import gc
import logging
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from kdcache.cache import Cache, open_cache
from kdcache.cache.batches import MicroBatches
from kdcache.cache.curriculum import PacedOrder
from kdcache.cache.order import Order, ShuffledOrder
from kdcache.cache.prefetch import largest_shard_bytes, required_bytes
from kdcache.cache.reader import OPEN_BYTES
from kdcache.config import build
from kdcache.errors import ConfigError, did_you_mean, first_line
from kdcache.losses import Objective, ObjectiveConfig
from kdcache.losses.from_cache import context_of, resolve_selection
from kdcache.students import Student, load_student
from kdcache.students.load import longest_input
from kdcache.students.sentence_model import fit_widths
from kdcache.tasks import task_of
from kdcache.train.config import TrainConfig
from kdcache.train.module import fit_terms

log = logging.getLogger(__name__)

#: Share of the weights that may stand still without a warning. Those of norms always do: they are about 1.
_MOST_STANDING_STILL = 0.25
#: Weights of a parameter that are looked at, evenly spread.
_LOOKED_AT = 1 << 18


@dataclass(frozen=True)
class PreparedRun:
    """A checked training run before its first step; nothing is written yet.

    ``config.objective`` is always set; if none was configured, it is the default of the task. In ``objective``, terms
    are built for ``student``, and selected shares of positions have become bounds.
    """

    config: TrainConfig
    cache: Cache
    student: Student
    objective: Objective

    @cached_property
    def chosen_N(self) -> NDArray[np.int64] | None:
        """The sequences that match the filter, in ascending order; None without a filter."""
        return chosen_sequences(self.config, self.cache)

    @cached_property
    def lengths_N(self) -> NDArray[np.int64]:
        """Positions of every sequence that is trained on."""
        lengths_N = self.cache.lengths_N
        return lengths_N if self.chosen_N is None else lengths_N[self.chosen_N]

    def micro_batches(self, rank: int = 0, num_ranks: int = 1) -> MicroBatches:
        """Return the micro-batches of one rank; raises the errors of the function `micro_batches`."""
        return micro_batches(self.config, self.cache, rank, num_ranks)

    def num_steps(self, batches: MicroBatches) -> int:
        """Return how many optimiser steps the run has."""
        return num_steps(self.config, batches.steps_per_epoch)

    def warn_of_rereading(self) -> None:
        """Warn when the shards in use cannot all stay open."""
        warn_of_rereading(self.config, self.cache, self.objective.needs.teacher_fields)

    def warn_of_rounding(self) -> None:
        """Warn when an update is smaller than the rounding of many weights, which then never change."""
        share = share_standing_still(self.student.model.parameters(), self.config.peak_learning_rate)
        if share >= _MOST_STANDING_STILL:
            log.warning(
                "at learning rate %g, %.0f%% of the weights stand still in a usual update: they are stored in %s, "
                "which rounds it away. Use student.dtype float32 (with precision bf16 the computation stays in "
                "bfloat16), or a higher learning_rate",
                self.config.peak_learning_rate,
                100 * share,
                self.config.student.dtype,
            )


def prepare(config: TrainConfig, *, cache: Cache | None = None, student: Student | None = None) -> PreparedRun:
    """Open the cache, load the student, and build the objective that fits both.

    Runs that share a cache or a student pass it as ``cache`` or ``student``; otherwise it is loaded as ``config`` says.
    Raises ``ConfigError``, ``CacheError`` or ``StudentError`` if the run cannot start.
    """
    check_machine(config)
    cache = open_training_cache(config) if cache is None else cache
    config = with_objective(config, cache)
    check_local_store(config, cache, ())  # first: the objective and the student read files of the cache
    objective = training_objective(config, cache)
    check_targets(config, cache)
    if student is None:
        student = load_student(config.student, cache.manifest, cache.tokenizer_dir(), longest=longest_input(cache))
    if config.gradient_checkpointing:
        student.checkpoint_activations()
    if student.sentence is not None:
        fit_widths(student.vocab_size, student.sentence, config.student, cache)
        check_pairs(objective, cache)
    fit_terms(objective, student, config.seed)
    check_local_store(config, cache, objective.needs.teacher_fields)  # again: the terms decide which fields are read
    return PreparedRun(config, cache, student, objective)


def with_objective(config: TrainConfig, cache: Cache) -> TrainConfig:
    """Return ``config`` with the objective that is trained on: where it names none, that of the cache's task."""
    if config.objective is not None:
        return config
    objective = build(ObjectiveConfig, task_of(cache.manifest.task).objective, source="the task's objective")
    return config.model_copy(update={"objective": objective})


def check_targets(config: TrainConfig, cache: Cache) -> None:
    """Raise ``ConfigError`` when no position that is trained on has a loss mask of 1, so all losses would be 0."""
    chosen_N = chosen_sequences(config, cache)
    if chosen_N is None:
        num_sequences, num_targets = len(cache), cache.manifest.statistics.num_positions
    else:
        counts_N = cache.sequence_table(["num_targets"])["num_targets"].to_numpy()
        num_sequences, num_targets = len(chosen_N), int(counts_N[chosen_N].sum())
    if num_targets == 0:
        advice = "dump texts with more tokens" if config.where is None else "change where, or train without it"
        raise ConfigError(
            f"there is nothing to learn: none of the {num_sequences:,} sequences that are trained on has a target "
            f"(their loss masks are 0 at all positions); {advice}"
        )


@torch.no_grad()
def share_standing_still(parameters: Iterable[torch.nn.Parameter], learning_rate: float) -> float:
    """Return the share of the trained weights that do not change when AdamW adds or subtracts ``learning_rate``.

    About that is an update, whatever the gradient is. The share is 0 for float32.
    """
    total = still = 0.0
    for parameter in parameters:
        if not parameter.requires_grad:
            continue
        total += parameter.numel()
        if parameter.dtype in (torch.bfloat16, torch.float16):
            some = parameter.flatten()[:: max(parameter.numel() // _LOOKED_AT, 1)]
            moves = (some + learning_rate != some) | (some - learning_rate != some)
            still += parameter.numel() * (1 - float(moves.float().mean()))
    return still / max(total, 1.0)


def check_machine(config: TrainConfig) -> None:
    """Raise ``ConfigError`` when this machine lacks the device, the precision or the logger of the run."""
    check_device(config)
    check_logger(config.report_to)


def check_logger(name: str) -> None:
    """Raise ``ConfigError`` unless the Trainer knows a logger called ``name`` and its package is installed."""
    if name in ("none", "all"):
        return
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    if name not in INTEGRATION_TO_CALLBACK:
        hint = did_you_mean(name, ["none", "all", *INTEGRATION_TO_CALLBACK])
        raise ConfigError(f"report_to: unknown logger {name!r}; {hint}")
    try:
        INTEGRATION_TO_CALLBACK[name]()  # the only check that all loggers have
    except (RuntimeError, ImportError) as error:
        raise ConfigError(f"report_to: {name} cannot be used: {first_line(error)}") from None


def check_pairs(objective: Objective, cache: Cache) -> None:
    """Raise ``ConfigError`` if a term compares pairs of texts but the cache has none. The term would always be 0."""
    terms = [name for name, term in objective.config.terms.items() if term.needs_pairs]
    if terms and cache.manifest.num_positions == cache.manifest.num_sequences:
        raise ConfigError(
            f"objective.{terms[0]} compares pairs of texts, and every document of the cache is a single text; dump a "
            "corpus with a column text_pair (or --column text_pair=NAME), or remove the term"
        )


def open_training_cache(config: TrainConfig) -> Cache:
    """Open the cache so that all shards that a step may read from can stay open."""
    # A stream may reach from one shuffle window into the next.
    local_store = config.local_store.model_copy(update={"num_processes": _processes_of_store(config)})
    cache = open_cache(config.cache, max_open_shards=2 * _shards_in_use(config), local_store=local_store)
    if config.curriculum is not None:
        cache.max_open_shards = max(cache.manifest.num_shards, 1)
    return cache


def _shards_in_use(config: TrainConfig) -> int:
    """Return how many shards this process reads from at a time, if the cache has that many."""
    own_streams = config.num_streams // math.gcd(config.num_streams, started_processes())
    return own_streams * config.shuffle_window


def _processes_of_store(config: TrainConfig) -> int:
    """Return how many processes of this machine share the local store, as far as this run knows."""
    return config.local_store.num_processes * int(os.environ.get("LOCAL_WORLD_SIZE", started_processes()))


def check_local_store(config: TrainConfig, cache: Cache, hidden: Iterable[str]) -> None:
    """Raise ``ConfigError`` when the local store is so small that shards would be downloaded repeatedly.

    ``hidden`` are the hidden-state fields that are read too.
    """
    if cache.folder.store is None:
        return
    num_shards = cache.manifest.num_shards if config.curriculum is not None else _shards_in_use(config)
    num_processes = _processes_of_store(config)
    fields = cache.fields_read(hidden)
    needed = required_bytes(cache.manifest, fields, shards_at_a_time=num_shards, num_processes=num_processes)
    if needed > config.local_store.max_bytes:
        raise ConfigError(
            f"local_store.max_bytes is {config.local_store.max_bytes:,} and this run needs {needed:,}: a process reads "
            f"from {num_shards} shards at a time (num_streams x shuffle_window; a curriculum from all), the number of "
            f"processes is {num_processes}, and the largest shard has "
            f"{largest_shard_bytes(cache.manifest, fields):,} bytes; raise local_store.max_bytes "
            "(--local-store-bytes), or lower num_streams or shuffle_window"
        )


def warn_of_rereading(config: TrainConfig, cache: Cache, hidden: Iterable[str]) -> None:
    """Warn when the shards in use cannot all be open; ``hidden`` are the hidden-state fields that are read too."""
    num_shards = cache.manifest.num_shards
    in_use = num_shards if config.curriculum is not None else min(_shards_in_use(config), num_shards)
    num_bytes = cache.encoded_bytes(hidden) * in_use / max(num_shards, 1)
    if num_bytes <= OPEN_BYTES:
        return
    if config.curriculum is not None:
        cause, advice = "a curriculum reads from all over the cache, whose", "Train without one"
    else:
        cause, advice = "the order of training mixes", "Lower num_streams or shuffle_window"
    log.warning(
        "%s %d shards take %.1f GB in memory, and at most %.1f GB stay there: batches will read shards again and "
        "again. %s, or train on a smaller cache (kdcache transcode: fewer ids, a smaller codec, --where)",
        cause,
        in_use,
        num_bytes / 1e9,
        OPEN_BYTES / 1e9,
        advice,
    )


def check_device(config: TrainConfig) -> None:
    """Raise ``ConfigError`` when this machine lacks the device or the precision."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is cuda, but this machine has no usable CUDA device; use --device cpu or auto")
    on_cuda = config.device != "cpu" and torch.cuda.is_available()
    if on_cuda and config.precision == "bf16" and not torch.cuda.is_bf16_supported():
        raise ConfigError("precision is bf16, which this CUDA device does not support; use fp32")


def uses_cpu(config: TrainConfig) -> bool:
    """Return whether the run uses the CPU. Unless the Trainer is told, several processes train a model each."""
    return config.device == "cpu" or (config.device == "auto" and not torch.accelerator.is_available())


def started_processes() -> int:
    """Return how many processes a launcher such as torchrun started for this run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def check_processes(num_ranks: int) -> None:
    """Raise ``ConfigError`` when a launcher started several processes that would each train alone.

    ``num_ranks`` is the number of processes that share the steps of this run.
    """
    started = started_processes()
    if started != num_ranks:
        raise ConfigError(
            f"{started} processes were started, but on this machine's device each would train alone, and all write to "
            "the same output; start one process, or train on the CPU (--device cpu)"
        )


def leave_processes() -> None:
    """Leave the process group at the end of a run.

    Without this, communication threads may kill a process at exit, after its work is done, or keep it from ending.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        # The Trainer's cycles hold the gradient reducer, and with it the store of the group. Freed by the interpreter
        # at its very end, the store waits for its own thread for ever.
        gc.collect()
        torch.distributed.destroy_process_group()


def training_objective(config: TrainConfig, cache: Cache) -> Objective:
    """Return the objective of the run; selected shares of positions become bounds on the sequences trained on.

    Raises ``ConfigError`` if the cache lacks data that the objective needs.
    """
    objective = with_objective(config, cache).objective
    assert objective is not None
    chosen_N = chosen_sequences(config, cache) if objective.shares else None
    return Objective(resolve_selection(objective, cache, chosen_N), context=context_of(cache))


def micro_batches(config: TrainConfig, cache: Cache, rank: int = 0, num_ranks: int = 1) -> MicroBatches:
    """Return the micro-batches of one rank.

    Raises ``ConfigError`` when the filter matches nothing, or a sequence has no value in the curriculum's column.
    """
    return MicroBatches(
        cache,
        _order(config, cache, config.batch_sequences * config.gradient_accumulation * num_ranks),
        batch_sequences=config.batch_sequences,
        accumulation=config.gradient_accumulation,
        rank=rank,
        num_ranks=num_ranks,
    )


def num_steps(config: TrainConfig, steps_per_epoch: int) -> int:
    """Return how many optimiser steps the run has."""
    if config.max_steps is not None:
        return config.max_steps
    epochs = 1.0 if config.epochs is None else config.epochs
    # Rounded first: 1.1 x 100 is 110 steps, not 111.
    return max(math.ceil(round(epochs * steps_per_epoch, 6)), 1)


def chosen_sequences(config: TrainConfig, cache: Cache) -> NDArray[np.int64] | None:
    """Return the sequences that match the filter, [N] in ascending order; None without a filter.

    Raises ``ConfigError`` when nothing matches.
    """
    return None if config.where is None else cache.where(config.where)


def _order(config: TrainConfig, cache: Cache, sequences_per_step: int) -> Order:
    chosen_N = chosen_sequences(config, cache)
    if config.curriculum is None:
        return ShuffledOrder(
            cache.shard_starts, config.seed, config.shuffle_window, cache.order_key, chosen_N, config.num_streams
        )
    chosen_N = np.arange(len(cache)) if chosen_N is None else chosen_N
    name = f"{cache.order_key}/{config.seed}"
    return PacedOrder(
        config.curriculum,
        config.curriculum.ranking(cache.sequences, chosen_N, name),
        num_steps=num_steps(config, math.ceil(len(chosen_N) / sequences_per_step)),
        sequences_per_step=sequences_per_step,
        name=name,
    )
