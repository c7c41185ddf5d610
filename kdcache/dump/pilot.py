"""Pilots: a few sequences from all over a corpus, run through the teacher before the dump starts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from kdcache.codecs import vector_codec
from kdcache.codecs.vectors import relative_error
from kdcache.dump.answers import answers
from kdcache.dump.config import DumpConfig
from kdcache.dump.plan import LayerPilot
from kdcache.schema import Sequence, TargetsRecord, layer_field
from kdcache.tasks import Sequences
from kdcache.teachers.base import Answer, Request, Teacher

#: Positions that tell what a codec of hidden states costs.
_LAYER_POSITIONS = 512


def pilot_sequences(sequences: Sequences, num_positions: int) -> list[int]:
    """Return sequences spread evenly over the corpus with at least ``num_positions`` (or all of a smaller corpus)."""
    most = sequences.num_sequences
    mean = sequences.num_tokens / max(most, 1)
    count = min(most, max(4, int(num_positions / mean) + 1))
    while True:
        chosen: list[int] = np.unique(np.linspace(0, most - 1, count).astype(int)).tolist()
        found = sum(sequences.sequence(index).num_positions for index in chosen)
        if found >= num_positions or len(chosen) >= most:
            return chosen
        # The chosen ones are shorter than the mean.
        count = min(most, max(count + 1, int(count * num_positions / max(found, 1))))


def run_pilot(
    chosen: list[int], sequences: Sequences, teacher: Teacher, request: Request, batch_tokens: int
) -> tuple[Answer, list[Sequence]]:
    """Run some sequences from anywhere in the corpus; return the answer to all of them, and the sequences from 0 on."""
    picked = [replace(sequences.sequence(index), index=number) for number, index in enumerate(chosen)]
    offsets = np.concatenate([[0], np.cumsum([s.num_positions for s in picked])])
    parts, rows = [], []
    for batch, answer in answers(teacher, picked, request, batch_tokens):
        parts.append(answer)
        rows += [np.arange(offsets[s.index], offsets[s.index + 1]) for s in batch]
    joined, order = Answer.concatenate(parts), np.argsort(np.concatenate(rows))
    vectors = {name: values[order] for name, values in joined.vectors.items()}
    return Answer(joined.targets.take(order), vectors, joined.tail_sum), picked


def layer_pilot(config: DumpConfig, sequences: Sequences, teacher: Teacher, layers: list[int]) -> dict[int, LayerPilot]:
    """Run a few sequences for the width of each hidden state (OPT projects its last one) and what its codec costs."""
    if not layers:
        return {}
    codec = vector_codec(config.hidden_states.codec)
    request = Request(TargetsRecord(kind="outputs", top_k=0), tuple(layers))  # no targets: states alone
    states: dict[int, list[NDArray[np.float32]]] = {layer: [] for layer in layers}
    for index in pilot_sequences(sequences, _LAYER_POSITIONS):
        answer = teacher.answer([sequences.sequence(index)], request)
        for layer in layers:
            states[layer].append(answer.vectors[layer_field(layer)])
    joined = {layer: np.concatenate(parts) for layer, parts in states.items()}
    return {layer: LayerPilot(rows.shape[1], relative_error(codec, rows)) for layer, rows in joined.items()}
