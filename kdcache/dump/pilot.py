"""Pilots: a few sequences from all over a corpus, run through the teacher before it runs for good."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from kdcache.codecs import vector_codec
from kdcache.codecs.vectors import relative_error
from kdcache.dump.batches import BatchRunner, ShardRows
from kdcache.dump.config import DumpConfig
from kdcache.dump.plan import LayerPilot
from kdcache.models.batching import batches_by_length
from kdcache.schema import Sequence
from kdcache.tasks import Sequences
from kdcache.teachers import HuggingFaceTeacher
from kdcache.teachers.huggingface import hidden_to_numpy

#: Positions that tell what a codec of hidden states costs.
_LAYER_POSITIONS = 512


def pilot_sequences(sequences: Sequences, num_positions: int) -> list[int]:
    """Return sequences spread evenly over the corpus with about ``num_positions`` (or all of a small corpus)."""
    mean = sequences.num_tokens / max(sequences.num_sequences, 1)
    count = min(sequences.num_sequences, max(4, int(num_positions / mean) + 1))
    return np.unique(np.linspace(0, sequences.num_sequences - 1, count).astype(int)).tolist()


def run_rows(
    chosen: list[int], sequences: Sequences, runner: BatchRunner, batch_tokens: int
) -> tuple[ShardRows, list[Sequence]]:
    """Run some sequences from anywhere in the corpus; return their rows and the sequences, renumbered from 0."""
    picked = []
    for number, index in enumerate(chosen):
        sequence = sequences.sequence(index)
        picked.append(replace(sequence, index=number))
    lengths = np.array([s.num_positions for s in picked], dtype=np.int64)
    rows = ShardRows(lengths, 0, runner.record)
    for group in batches_by_length(np.array([s.num_fed for s in picked]), batch_tokens):
        runner.run([picked[n] for n in group], rows.put)
    return rows, picked


def layer_pilot(
    config: DumpConfig, sequences: Sequences, teacher: HuggingFaceTeacher, layers: list[int]
) -> dict[int, LayerPilot]:
    """Run a few sequences for the width of each hidden state (OPT projects its last one) and what its codec costs."""
    if not layers:
        return {}
    codec = vector_codec(config.hidden_states.codec)
    states: dict[int, list[NDArray[np.float32]]] = {layer: [] for layer in layers}
    for index in pilot_sequences(sequences, _LAYER_POSITIONS):
        for layer, found in teacher.run([sequences.sequence(index)], layers).hidden.items():
            states[layer].append(hidden_to_numpy(found))
    joined = {layer: np.concatenate(parts) for layer, parts in states.items()}
    return {layer: LayerPilot(rows.shape[1], relative_error(codec, rows)) for layer, rows in joined.items()}
