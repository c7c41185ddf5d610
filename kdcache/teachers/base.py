"""The base of all teachers: what one can give, what it is asked for, and its answer.

A teacher may be a model in this process, a server, or a file of stored logits. So a dump asks for targets and vectors,
never for logits, and only for what `Capabilities` promise: `Teacher.check` compares the two before the teacher runs.
Teachers that have logits share the reduction to targets in `kdcache.teachers.logits`.

A *backend* (`Backend`, a row of ``BACKENDS``) configures and loads the teachers of one kind. Nothing here needs torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from kdcache.cache.tail_prior import TailSum
from kdcache.config import Config
from kdcache.errors import ConfigError, TeacherError
from kdcache.schema import FieldRecord, OutputsRecord, Sequence, Targets, TargetsRecord, TeacherRecord, public_name
from kdcache.targets_config import layer_number
from kdcache.tasks import Task


@dataclass(frozen=True)
class Capabilities:
    """What a teacher supports. By default: the most probable ids with their log-probabilities only.

    ``batch_tokens`` and the limits below it shape the batches of a dump; ``batch_tokens`` is a default, which the
    configuration overrides.
    """

    logits: bool = False
    """The logits of the whole vocabulary: every kind of targets, every scalar, thresholds, samples, other temperatures
    and the tail prior follow from them. The teacher is a `kdcache.teachers.logits.LogitsTeacher`."""
    scalars: tuple[str, ...] = ()
    """Of ``log_tail`` (the exact mass of all other ids), ``gold_logprob`` and ``entropy``, those that are known."""
    max_top_k: int | None = None
    """Most ids at a position; None: no limit."""
    hidden_states: bool = False
    lm_head: bool = False
    """The LM head can be split off, so that the last hidden state is the whole distribution."""
    outputs: bool = False
    """Raw outputs: logits of classes, scores, embeddings."""
    attention: bool = False
    packing: bool = False
    """Attention does not cross documents in a packed window."""
    context_length: int | None = None
    """Most tokens of a sequence; None: no limit is known."""
    num_ids: int | None = None
    """Token ids that the model has; None: all of its tokenizer. A tokenizer may have more that no text uses."""
    batch_tokens: int = 16384
    """Tokens of a batch, padding included, unless the configuration says otherwise."""
    max_batch_sequences: int | None = None
    """Most sequences of a batch; None: no limit."""
    concurrency: int = 1
    """Batches that the teacher answers at the same time; above 1, `Teacher.answer` is called from several threads."""


@dataclass(frozen=True)
class Request:
    """What a teacher is asked to give at every position; the same for all batches of a dump."""

    targets: TargetsRecord
    layers: tuple[int, ...] = ()
    """Hidden states, by number: 0 is the embeddings, the number of layers the state after the final norm."""
    outputs: bool = False
    """Raw outputs."""
    packed: bool = False
    """Sequences hold several documents, and attention must not cross them."""
    fields: tuple[FieldRecord, ...] = ()
    """Other fields that the plan stores; `Answer.vectors` has a value for each, as the kind of the field stages it."""


@dataclass
class Answer:
    """What a teacher gives for the P positions of a batch, sequence by sequence.

    ``vectors`` maps names of fields (``hidden-12``, ``outputs``) to float32 [P, D]. ``tail_sum`` is what the batch adds
    to the tail prior, where that is asked for.
    """

    targets: Targets
    vectors: dict[str, NDArray[Any]] = field(default_factory=dict)
    tail_sum: TailSum | None = None

    @staticmethod
    def concatenate(parts: list[Answer]) -> Answer:
        """Return the answers of several batches as that of one."""
        if len(parts) == 1:
            return parts[0]
        names = parts[0].vectors
        return Answer(
            Targets.concatenate([part.targets for part in parts]),
            {name: np.concatenate([part.vectors[name] for part in parts]) for name in names},
            add_tail_sums(part.tail_sum for part in parts),
        )


def add_tail_sums(parts: Iterator[TailSum | None]) -> TailSum | None:
    """Return the sum of the tail sums of some batches; None where there are none."""
    total: TailSum | None = None
    for part in parts:
        if part is not None:
            total = (
                part if total is None else TailSum(total.sum_V + part.sum_V, total.num_positions + part.num_positions)
            )
    return total


class Teacher(ABC):
    """The interface through which a dump runs a teacher."""

    record: TeacherRecord
    capabilities: Capabilities

    @abstractmethod
    def answer(self, sequences: SequenceOf[Sequence], request: Request) -> Answer:
        """Return targets and vectors at all positions of ``sequences``, in their order; raises ``TeacherError``."""

    def check(self, request: Request) -> None:
        """Raise ``TeacherError`` naming everything in ``request`` that cannot be given, and what to set instead."""
        problems = list(_lacking(self.capabilities, request))
        if problems:
            lacks = " and ".join(dict.fromkeys(what for what, _ in problems))
            advice = ", ".join(dict.fromkeys(setting for _, setting in problems))
            raise TeacherError(
                f"teacher backend {self.record.backend!r} cannot give {lacks} of {self.record.name}; set {advice}, or "
                "use another backend"
            )


class BackendConfig(Config):
    """Settings that every backend has; a backend adds its own."""

    backend: str
    """Row of ``BACKENDS``."""
    model: str = Field(min_length=1)
    """Which model; the backend says what the name means."""

    private: ClassVar[tuple[str, ...]] = ()
    """Names of settings that are never written into a cache: URLs, keys."""

    def public(self) -> dict[str, Any]:
        """Return settings that are safe to write into a shared cache. Absolute paths are reduced to their last part."""
        settings = self.model_dump(mode="json", exclude=set(self.private))
        return {name: public_name(value) if isinstance(value, str) else value for name, value in settings.items()}


class Backend(ABC):
    """How the teachers of one kind are configured and loaded: a row of ``BACKENDS``. Backends have no state.

    Checks come before loads, so that most mistakes show before anything expensive happens.
    """

    name: ClassVar[str]
    config: ClassVar[type[BackendConfig]]
    """Model of ``teacher`` in the configuration."""

    def check(self, config: Any) -> None:  # noqa: B027 - most backends have nothing to check
        """Raise ``ConfigError`` for settings that cannot be used on this machine; loads nothing."""

    @abstractmethod
    def load_tokenizer(self, config: Any) -> Any:
        """Return the tokenizer of the teacher, as transformers has it; raises ``TeacherError``."""

    def num_ids(self, config: Any) -> int | None:
        """Return the number of token ids that the teacher has, where that is known before it is loaded."""
        return None

    def outputs_record(self, config: Any, task: Task, settings: Any, encoder: Any) -> OutputsRecord | None:
        """Describe the raw outputs of a teacher of ``task``; None for tasks that predict tokens.

        ``settings`` are the task's, ``encoder`` a `kdcache.models.tokenizer.TextEncoder`. Raises ``TeacherError``.
        """
        if task.gives != "tokens":
            raise TeacherError(
                f"teacher backend {self.name!r} has no raw outputs, which task {task.name} needs; choose a task that "
                "predicts tokens, or teacher.backend=transformers"
            )
        return None

    @abstractmethod
    def load(
        self, config: Any, vocab_size: int, task: Task, outputs: OutputsRecord | None, *, is_preview: bool = False
    ) -> Teacher:
        """Load a teacher of ``task`` whose tokenizer has ``vocab_size`` ids; raises ``TeacherError``.

        With ``is_preview`` nothing is written. The hash of the weights may then come from an earlier load.
        """


def _lacking(can: Capabilities, request: Request) -> Iterator[tuple[str, str]]:
    """Yield each unsupported item of the request, and the setting that avoids it."""
    wanted = request.targets
    if not can.logits:
        yield from _lacking_without_logits(can, wanted)
    if wanted.kind == "hidden" and not (can.lm_head and can.hidden_states):
        yield "the last hidden state and LM head", "targets.kind=top-k"
    elif request.layers and not can.hidden_states:
        yield "hidden states", "hidden_states.layers=[]"
    if request.outputs and not can.outputs:
        yield "raw outputs", "another task"
    if request.packed and not can.packing:
        yield "documents of a packed window that do not see each other", "sequences.packing=none"


def _lacking_without_logits(can: Capabilities, wanted: TargetsRecord) -> Iterator[tuple[str, str]]:
    if wanted.kind in ("sampled", "hybrid"):
        yield f"samples (targets of the kind {wanted.kind})", "targets.kind=top-k"
        return
    if can.max_top_k is not None and wanted.top_k > can.max_top_k:
        yield f"{wanted.top_k} ids at a position", f"targets.top_k={can.max_top_k} or less"
    if wanted.is_ragged:
        yield "ids by min_prob or min_mass", "targets.min_prob=0 and targets.min_mass=1"
    if wanted.temperatures:
        yield "tails at other temperatures", "targets.temperatures=[]"
    if wanted.tail_prior:
        yield "the tail prior", "targets.tail_prior=false"
    if wanted.kind != "top-k":
        return
    if "log_tail" in wanted.scalars and "log_tail" not in can.scalars:
        yield "the exact tail", "targets.tail=remainder"
    names = {"gold_logprob": "the log-probability of the gold token", "entropy": "the entropy"}
    known = [name for name in wanted.scalars if name in can.scalars]
    for name in wanted.scalars:
        if name in names and name not in can.scalars:
            yield names[name], f"targets.scalars=[{', '.join(known)}]"


def parse_layers(names: SequenceOf[str | int], num_layers: int) -> list[int]:
    """Turn ``["last", 12, -2]`` into sorted layer numbers; negative ones count from the end, ``last`` is -1."""
    layers = set()
    for name in names:
        layer = layer_number(name, num_layers)
        if not 0 <= layer <= num_layers:
            raise ConfigError(
                f"the teacher has no hidden state {str(name).strip()}; it has 0 (embeddings) to {num_layers} (last)"
            )
        layers.add(layer)
    return sorted(layers)


def top_k_targets(ids_PK: NDArray[Any], logprobs_PK: NDArray[Any]) -> Targets:
    """Return targets of a teacher that gives the most probable ids alone, most probable first.

    The tail is one minus the kept mass; label and entropy are unknown. Raises ``TeacherError`` for rows out of order.
    """
    logprobs_PK = np.asarray(logprobs_PK, np.float32)
    if (np.diff(logprobs_PK, axis=1) > 0).any():
        raise TeacherError("the log-probabilities of a position increase; the backend must sort them, largest first")
    tail_P = 1 - np.exp(logprobs_PK.astype(np.float64)).sum(axis=1)
    with np.errstate(divide="ignore"):
        log_tail_P = np.log(np.maximum(tail_P, 0)).astype(np.float32)
    return Targets(np.asarray(ids_PK, np.int32), logprobs_PK, log_tail_P)
