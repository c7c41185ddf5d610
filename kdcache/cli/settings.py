"""The settings behind the options that several commands share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import click

#: Teacher, corpus and sequences: option by setting.
SOURCES = {
    "teacher.model": "teacher",
    "teacher.dtype": "dtype",
    "teacher.device": "device",
    "teacher.revision": "revision",
    "corpus.paths": "corpus",
    "corpus.text_field": "text_field",
    "corpus.split_text": "split_text",
    "corpus.limit_documents": "limit_documents",
    "corpus.leave_out": "leave_out",
    "sequences.max_length": "max_length",
    "task": "task",
    "batch_tokens": "batch_tokens",
}
#: Targets and hidden states: option by setting.
TARGETS = {
    "targets.kind": "targets",
    "targets.top_k": "top_k",
    "targets.min_prob": "min_prob",
    "targets.min_mass": "min_mass",
    "targets.num_samples": "samples",
    "targets.temperatures": "temperatures",
    "targets.tail_prior": "tail_prior",
    "targets.codec": "codec",
    "hidden_states.codec": "hidden_codec",
}


def of_sources(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of teacher, corpus and sequences by their dotted names."""
    packing = "window" if given["pack"] else None
    named = {setting: given[option] for setting, option in SOURCES.items()}
    return {"sequences.packing": packing, **of_columns(given["column"]), **named}


def of_columns(columns: Sequence[str]) -> dict[str, Any]:
    """Return the settings of ``--column ROLE=NAME`` options by their dotted names."""
    return {f"corpus.columns.{role}": name for role, name in map(_column, columns)}


def _column(text: str) -> tuple[str, str]:
    role, equals, name = text.partition("=")
    if not equals or not role or not name:
        raise click.BadParameter(f"expected ROLE=NAME, such as label=sentiment, found {text!r}", param_hint="--column")
    return role, name


def of_targets(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of targets and of the codec of hidden states, by their dotted names."""
    return {setting: given[option] for setting, option in TARGETS.items()}
