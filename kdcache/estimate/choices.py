"""List which loss settings are compatible with a cache, by asking every loss for one setting after another."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

import torch

from kdcache.losses import LOSSES, Loss, TeacherContext, incompatibility
from kdcache.models.lm_head import LMHead
from kdcache.schema import TargetsRecord

#: Stands for every temperature; no cache stores this one.
_SOME_TEMPERATURE = 1.618034


@dataclass
class LossChoices:
    """The settings of a loss that a kind of targets allows.

    ``incompatibility`` says why there are none. ``tails`` are those allowed at temperature 1. ``modes`` are the ways to
    apply other temperatures, each with its temperatures: ``any``, or those that the cache stores.
    """

    loss: str
    incompatibility: str | None
    tails: tuple[str, ...] = ()
    modes: dict[str, str] | None = None


def student_choices(record: TargetsRecord, vocab_size: int) -> list[LossChoices]:
    """Return what every loss allows on a cache whose targets are ``record``."""
    context = context_of_record(record, vocab_size)
    return [_choices_of(name, loss, context) for name, loss in LOSSES.importable().items()]


def context_of_record(record: TargetsRecord, vocab_size: int) -> TeacherContext:
    """Return the context of a cache that does not exist yet, with placeholders for its prior and its LM head."""
    return TeacherContext(
        kind=record.kind,
        vocab_size=vocab_size,
        is_ragged=record.is_ragged,
        temperatures=record.temperatures,
        prior_V=torch.ones(vocab_size) if record.tail_prior else None,
        head=LMHead(torch.ones(vocab_size, 1)) if record.kind == "hidden" else None,
        num_kept=record.top_k,
    )


def _choices_of(name: str, loss: type[Loss], context: TeacherContext) -> LossChoices:
    problem = incompatibility(loss(weight=1), context)
    tails = tuple(tail for tail in _options(loss, "tail") if _is_allowed(loss, context, tail=tail))
    modes = dict(_modes(loss, context)) if "temperature" in loss.model_fields else None
    return LossChoices(name, problem if not tails else None, tails, modes)


def _modes(loss: type[Loss], context: TeacherContext) -> Iterator[tuple[str, str]]:
    for mode in _options(loss, "mode"):
        if _is_allowed(loss, context, mode=mode, temperature=_SOME_TEMPERATURE):
            yield mode, "any"
        else:
            stored = [t for t in context.temperatures if _is_allowed(loss, context, mode=mode, temperature=t)]
            if stored:
                yield mode, ", ".join(f"{t:g}" for t in stored)


def _is_allowed(loss: type[Loss], context: TeacherContext, **settings: Any) -> bool:
    return incompatibility(loss(weight=1, **settings), context) is None


def _options(loss: type[Loss], name: str) -> tuple[str, ...]:
    """Return the values of a setting of a loss, none if it has no such setting."""
    found = loss.model_fields.get(name)
    return tuple(_literals(found.annotation)) if found else ()


def _literals(annotation: Any) -> Iterator[str]:
    for part in get_args(annotation):
        if get_origin(annotation) is Literal:
            yield part
        else:
            yield from _literals(part)
