"""A Hugging Face model as a teacher.

The body runs on a padded batch; everything after it works on the task's positions only. Hidden states of middle layers
come from the model's own ``output_hidden_states``: number n is the state after layer n, 0 the embeddings, and the last
one is taken after the final norm, as in every Hugging Face model. Those of encoder-decoders are the decoder's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdcache.errors import TeacherError
from kdcache.models.bodies import Whole, context_length, fed, num_input_ids, num_layers, split_for
from kdcache.models.hub import commit_of
from kdcache.models.lm_head import BufferedHead, LMHead
from kdcache.models.loading import load_model, parse_dtype, pick_device
from kdcache.models.packing import keeps_documents_apart
from kdcache.models.padding import EqualLengths, without_padding
from kdcache.models.pooling import load_projection
from kdcache.models.trying import failures_of
from kdcache.models.weights import remembered_sha256, weights_sha256
from kdcache.schema import SCALARS, OutputsRecord, Sequence, TeacherRecord, WeightsIdentity
from kdcache.tasks import TASKS, Task
from kdcache.tasks.causal_lm import CausalLM
from kdcache.teachers.base import Capabilities, Request
from kdcache.teachers.config import TeacherConfig
from kdcache.teachers.logits import LogitsTeacher, TeacherOutput

log = logging.getLogger(__name__)


class HuggingFaceTeacher(LogitsTeacher):
    """A model in eval mode, split into body and head where that reproduces its logits.

    ``vocab_size`` is the true one of its tokenizer, and as an attribute the number of its ids that the model has;
    ``outputs`` describes the raw outputs, for tasks that have them.
    ``weights_sha256`` is the hash of its weights, where that is known already.
    """

    def __init__(
        self,
        model: Any,
        name: str,
        vocab_size: int,
        revision: str | None = None,
        task: Task = TASKS[CausalLM.name],
        outputs: OutputsRecord | None = None,
        weights_sha256: str | None = None,
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.device = next(model.parameters()).device
        self.task, self.outputs, self.name = task, outputs, name
        with failures_of(model, name, task.name, TeacherError):
            self._prepare(name, vocab_size, revision, weights_sha256)

    def _prepare(self, name: str, vocab_size: int, revision: str | None, weights_sha256: str | None) -> None:
        model, task = self.model, self.task
        self._parts = split_for(task.body, model, self.outputs)
        if self._parts is None:
            _check_can_go_whole(task, name)
            log.warning("the LM head of %s cannot be split off; its full logits are made batch by batch", name)
        self._body: Callable[..., Any] = self._parts.body if self._parts else Whole(model)
        head = self._parts.head() if self._parts else None
        embedded = num_input_ids(model)
        rows = head.vocab_size if head is not None and task.gives == "tokens" else embedded
        # Ids of the tokenizer that the model does not have, which no text may use.
        self.vocab_size = min(vocab_size, rows, embedded)
        self._head = BufferedHead(head.narrow(self.vocab_size)) if head is not None and task.gives == "tokens" else None
        if task.is_causal:
            _check_causal(self, name)
        self._body = without_padding(self._body, model, name, TeacherError)
        self.record = _describe(model, name, rows, revision, weights_sha256)

    @property
    def sees_padding(self) -> bool:
        """Whether the model is run on texts of one length at a time, because its answers depend on padding."""
        return isinstance(self._body, EqualLengths)

    @property
    def num_layers(self) -> int:
        """Number of layers; hidden states are numbered 0 (embeddings) to this (after the final norm)."""
        return num_layers(self.model)

    @cached_property
    def capabilities(self) -> Capabilities:  # type: ignore[override]
        """What this model can give: everything that follows from logits, and what its architecture adds."""
        # A model that cannot be split makes the logits of a whole batch at once: at most 2^28 numbers.
        most_tokens = 1 << 30 if self._parts is not None else max(1, (1 << 28) // self.record.vocab_size)
        return Capabilities(
            logits=True,
            scalars=SCALARS,
            hidden_states=True,
            lm_head=self._head is not None,
            outputs=self.outputs is not None,
            packing=self.task.is_causal,  # `check_packing` tries it
            context_length=context_length(self.model),
            num_ids=self.vocab_size,
            batch_tokens=min(4096 if self.device.type == "cpu" else 16384, most_tokens),
        )

    @property
    def head(self) -> LMHead:
        """The LM head over the true vocabulary; raises ``TeacherError`` for a model without one.

        Works for every family whose logits are ``cap(scale * (hidden @ W.T + b))`` of its last hidden state (Llama,
        Qwen, Mistral, GPT-2, GPT-NeoX, OPT, the scales of Cohere and Granite, Gemma's soft cap, ...), found by trying.
        """
        if self._head is None:
            raise TeacherError(
                f"the logits of {self.record.name} ({self.record.architecture}) are not its last hidden state times a "
                "matrix, scaled or soft-capped, so they cannot be rebuilt from it; use --targets top-k"
            )
        return self._head.head

    def check(self, request: Request) -> None:
        if request.targets.kind == "hidden":
            _ = self.head  # says why this model has none
        super().check(request)
        if request.packed:
            self.check_packing()

    def check_packing(self) -> None:
        """Raise ``TeacherError`` when the documents of a packed window would see each other."""
        if not keeps_documents_apart(self.model, self.vocab_size):
            raise TeacherError(
                f"{self.record.name} ({self.record.architecture}) reads across the documents of a packed window; dump "
                "without packing, or set sequences.attend_across_documents=true if that is wanted"
            )

    @torch.inference_mode()
    def run(self, sequences: SequenceOf[Sequence], layers: SequenceOf[int] = ()) -> TeacherOutput:
        """Run the model over one batch; ``layers`` are the hidden states to return.

        Raises ``TeacherError`` for whatever the code of the model raises, unless memory is full.
        """
        with failures_of(self.model, self.name, self.task.name, TeacherError):
            return self._run(sequences, layers)

    def _run(self, sequences: SequenceOf[Sequence], layers: SequenceOf[int]) -> TeacherOutput:
        batch = self.task.pad_batch(list(sequences), pad_id=0)
        tensors = {name: torch.from_numpy(value).to(self.device) for name, value in batch.items()}
        labels = torch.from_numpy(self.task.labels(list(sequences))).to(self.device)
        rows = tensors["rows"]

        def real(values_BLX: Tensor) -> Tensor:
            flat = values_BLX.reshape(-1, values_BLX.shape[-1])
            return flat if len(rows) == len(flat) else flat.index_select(0, rows)

        if self._parts is None:
            return self._run_whole(fed(tensors), labels, layers, real)
        from_last = self._parts.last_is_state
        wants_middle = any(layer != self.num_layers or not from_last for layer in layers)
        output = self._body(**fed(tensors), output_hidden_states=wants_middle)
        last_PD = real(output.last_hidden_state)
        if wants_middle and not _has_states(output, self.num_layers):
            raise TeacherError(
                f"{self.record.name} ({self.record.architecture}) does not return the states of its layers in task "
                f"{self.task.name}; dump without hidden_states.layers"
            )
        hidden = {
            layer: last_PD if from_last and layer == self.num_layers else real(output.hidden_states[layer])
            for layer in layers
        }
        if self._head is not None:
            return TeacherOutput(partial(self._head.logits, last_PD), labels, hidden)
        return TeacherOutput(partial(_rows_of, last_PD), labels, hidden, outputs_PC=last_PD)

    def _run_whole(
        self, inputs: dict[str, Tensor], labels: Tensor, layers: SequenceOf[int], real: Callable[[Tensor], Tensor]
    ) -> TeacherOutput:
        """Run a causal model whose LM head cannot be split off."""
        output = self._body(**inputs, output_hidden_states=bool(layers))
        logits_PV = real(output.last_hidden_state[..., : self.vocab_size])
        hidden = {layer: real(output.hidden_states[layer]) for layer in layers}
        return TeacherOutput(partial(_rows_of, logits_PV), labels, hidden)


def _has_states(output: Any, num_layers: int) -> bool:
    """Return whether a body gave a state of every layer at every cell of the grid (Funnel's layers have fewer)."""
    states = output.hidden_states
    grid = output.last_hidden_state.shape[:2]
    return bool(states) and len(states) == num_layers + 1 and all(state.shape[:2] == grid for state in states)


def _rows_of(logits_PV: Tensor, start: int, stop: int) -> Tensor:
    return logits_PV[start:stop]


def _check_can_go_whole(task: Task, name: str) -> None:
    if not task.is_causal:
        raise TeacherError(
            f"{name} cannot be split into a body and a head that make its logits again, which task {task.name} needs; "
            "use another architecture"
        )


def load_teacher(
    config: TeacherConfig,
    vocab_size: int,
    task: Task = TASKS[CausalLM.name],
    outputs: OutputsRecord | None = None,
    *,
    is_preview: bool = False,
) -> HuggingFaceTeacher:
    """Load the teacher; raises ``TeacherError`` when there is none or it is no model for ``task``.

    With ``is_preview`` the hash of its weights may be that of an earlier load of the same files.
    """
    device = pick_device(config.device)
    if config.dtype != "auto":
        dtype = parse_dtype(config.dtype)
    elif config.model.endswith(".gguf"):
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    else:
        dtype = None
    model = load_model(config.model, task, dtype=dtype, revision=config.revision, error=TeacherError)
    if task.body == "pooled":
        load_projection(model, config.model, config.revision)
    sha256 = remembered_sha256(model, config.model, config.revision) if is_preview else None
    return HuggingFaceTeacher(model.to(device), config.model, vocab_size, config.revision, task, outputs, sha256)


def _describe(model: Any, name: str, vocab_rows: int, revision: str | None, sha256: str | None = None) -> TeacherRecord:
    config = model.config.get_text_config()
    return TeacherRecord(
        name=name,
        architecture=type(model).__name__,
        identity=WeightsIdentity(
            sha256=weights_sha256(model) if sha256 is None else sha256,
            dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
            num_parameters=sum(p.numel() for p in model.parameters()),
        ),
        num_layers=num_layers(model),
        hidden_size=int(config.hidden_size),
        vocab_size=vocab_rows,
        revision=commit_of(name, revision) or revision,
    )


@torch.inference_mode()
def _check_causal(teacher: HuggingFaceTeacher, name: str) -> None:
    """Reject a model that looks ahead: its targets would leak labels (a BERT loads as a causal LM too)."""
    tokens = np.arange(9, dtype=np.uint32) % teacher.vocab_size
    changed = tokens.copy()
    changed[7] = (changed[7] + 1) % teacher.vocab_size
    mask = np.ones(8, dtype=np.uint8)
    plain, other = (teacher_logits(teacher, Sequence(0, t, mask)) for t in (tokens, changed))
    if torch.isnan(plain).any():
        return  # the dump itself reports it, with the position
    # Rounding may differ, also by more than a few units (in a mixture of experts the changed token can regroup the
    # others); what reads ahead moves them by a share of what the changed position itself moves.
    rounding = 16 * torch.finfo(plain.dtype).eps * float(plain.abs().max())
    slack = max(rounding, 1e-3 * float((plain[7] - other[7]).abs().max()))
    if float((plain[:7] - other[:7]).abs().max()) > slack:
        raise TeacherError(f"{name} is not a causal language model: its prediction depends on tokens that come later")


def teacher_logits(teacher: HuggingFaceTeacher, sequence: Sequence) -> Tensor:
    """Return a copy of all logits [L, V] of one short sequence, in the teacher's dtype."""
    output = teacher.run([sequence])
    # The teacher writes its next answer into the same memory; without a copy, two answers would always be equal.
    return output.logits(0, len(output.labels_P)).clone()
