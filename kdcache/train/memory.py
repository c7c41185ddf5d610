"""Estimate the memory of a training run from short passes over the student, whatever its architecture.

Weights, gradients and AdamW's two moments are counted. What a micro-batch adds is *measured*: a dispatch mode sees the
storage of every tensor that an operation makes, on any device, and when it is freed. So the numbers include whatever
the architecture keeps for its backward pass, and leave out what gradient checkpointing does not keep. Two measurements
of different size give a constant and a slope, from which the estimate follows:

- the body: forward and backward of one and of two sequences of up to 128 tokens; the slope is per token of a padded
  micro-batch, and the largest micro-batch consists of the longest sequence;
- the loss: all of it on half a chunk and on a whole one; more positions than a chunk take no more memory, apart from
  the gradient of their hidden states.

Not seen: work buffers inside an operation, fragmentation, and attention that stores a length x length array
(transformers' ``eager``). On a CPU the interpreter and its libraries come on top, often more than the run itself; they
are in memory before and measured there. It is an estimate for choosing a batch size; the tests compare it with the
measured peak of real runs.

Shape suffixes: B sequences, L positions, P flat positions, D width, V vocabulary.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import fields
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from kdcache.cache import Cache
from kdcache.cache.reader import OPEN_BYTES
from kdcache.config import Config
from kdcache.losses.kernel import default_chunk_positions
from kdcache.models.internals import TorchDispatchMode, identity_of_storage, leaves_of
from kdcache.models.trying import in_mode
from kdcache.step import StepInputs
from kdcache.train.module import Distiller
from kdcache.train.sample import Batch

_PROBE_TOKENS = 128


class MemoryReport(Config):
    """Bytes of a training run by purpose; ``available_bytes`` includes what this process already holds of them.

    ``shards_bytes`` are in main memory, everything else on the device. ``available_bytes`` is None where the system
    does not report it. ``process_bytes`` is what this process holds in main memory beside weights and shards: the
    interpreter and its libraries. It is not in the total, because it has been taken from what is available already.
    """

    device: str
    weights_bytes: int
    gradients_bytes: int
    optimiser_bytes: int
    activations_bytes: int
    loss_bytes: int
    shards_bytes: int
    available_bytes: int | None
    process_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """Bytes that the device must hold: all on a CPU, all but the shards elsewhere."""
        parts = (self.weights_bytes, self.gradients_bytes, self.optimiser_bytes, self.activations_bytes)
        return sum(parts) + self.loss_bytes + (self.shards_bytes if self.device == "cpu" else 0)

    @property
    def fits(self) -> bool:
        """Whether the total is available; True where that is unknown."""
        return self.available_bytes is None or self.total_bytes <= self.available_bytes


class AllocatedBytes(TorchDispatchMode):
    """Bytes of the tensors made while the mode is on: ``live`` now, and the ``peak`` of it."""

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # An output that shares its storage with an input is a view or was written in place.
        known = {identity_of_storage(storage) for storage in _storages((args, kwargs))}
        result = func(*args, **kwargs)
        for identity, storage in {identity_of_storage(storage): storage for storage in _storages(result)}.items():
            if identity not in known:
                self._add(storage)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        num_bytes = storage.nbytes()
        self.live += num_bytes
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, num_bytes).atexit = False

    def _free(self, num_bytes: int) -> None:
        self.live -= num_bytes


def _storages(tree: Any) -> Iterator[torch.UntypedStorage]:
    return (leaf.untyped_storage() for leaf in leaves_of(tree) if isinstance(leaf, Tensor))


def estimate_memory(
    module: Distiller,
    inputs: StepInputs,
    cache: Cache,
    *,
    batch_sequences: int,
    max_length: int,
    autocast: Callable[[], contextlib.AbstractContextManager[Any]],
    longest: Callable[[int], Batch] | None = None,
) -> MemoryReport:
    """Estimate the memory of training ``module`` on the device where its parameters are.

    ``inputs`` are leaves of some positions of the cache, on that device (`StepInputs.leaves`). The largest micro-batch
    has ``batch_sequences`` sequences, the longest of them ``max_length`` positions. Where rows are not the tokens of a
    sequence, ``longest`` makes a batch of that many copies of the longest one. ``autocast`` makes the context of the
    forward pass. Leaves weights and gradients as they are, and draws random numbers for dropout only.
    """
    parameters = list(module.parameters())
    device = parameters[0].device
    trained_bytes = _nbytes(parameter for parameter in parameters if parameter.requires_grad)
    held_bytes = _nbytes([*parameters, *module.buffers()])
    free_bytes = _free_bytes(device)
    has_bytes = held_bytes + (cache.open_bytes() if device.type == "cpu" else 0)
    process_bytes = _resident_bytes() - cache.open_bytes() - (held_bytes if device.type == "cpu" else 0)
    with _own_gradients(module):
        if longest is None:
            activations_bytes = _body_bytes(module, batch_sequences, max_length, autocast)
        else:
            one, two = (_batch_peak(module, longest(count), autocast) for count in (1, 2))
            activations_bytes = max(2 * one - two, 0) + (two - one) * batch_sequences
        loss_bytes = _loss_bytes(module, inputs, batch_sequences * max_length, autocast)
    return MemoryReport(
        device=device.type,
        weights_bytes=held_bytes,
        gradients_bytes=trained_bytes,
        optimiser_bytes=2 * trained_bytes,  # AdamW's moments have the dtype of the parameter
        activations_bytes=activations_bytes,
        loss_bytes=loss_bytes,
        shards_bytes=_shards_bytes(cache, module.hidden_fields),
        available_bytes=None if free_bytes is None else free_bytes + has_bytes,
        process_bytes=max(process_bytes, 0),
    )


@contextlib.contextmanager
def _own_gradients(module: nn.Module) -> Iterator[None]:
    """Give every trained parameter a gradient to add to, as in a run, and remove it afterwards; dropout is on."""
    before = [parameter.grad for parameter in module.parameters()]
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    try:
        with in_mode(module, training=True):
            yield
    finally:
        for parameter, gradient in zip(module.parameters(), before, strict=True):
            parameter.grad = gradient


def _body_bytes(module: Distiller, num_sequences: int, max_length: int, autocast: Callable[[], Any]) -> int:
    """Return the bytes of the body's forward and backward for ``num_sequences`` of ``max_length`` positions."""
    length = min(max_length, _PROBE_TOKENS)
    one, two = (_body_peak(module, count, length, autocast) for count in (1, 2))
    constant, per_token = max(2 * one - two, 0), (two - one) / length
    return round(constant + per_token * num_sequences * max_length)


def _body_peak(module: Distiller, num_sequences: int, length: int, autocast: Callable[[], Any]) -> int:
    student = module.student
    rows_P = torch.arange(num_sequences * length, device=student.head.weight_VD.device)
    input_ids = rows_P.remainder(student.vocab_size).view(num_sequences, length)
    batch = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "rows": rows_P}
    return _batch_peak(module, batch, autocast)


def _batch_peak(module: Distiller, batch: Batch, autocast: Callable[[], Any]) -> int:
    with AllocatedBytes() as memory:
        with autocast():
            hidden_PD, states = module.student.states(batch, module.objective.needs.student_layers)
        outputs = [hidden_PD, *states.values()]
        torch.autograd.backward(outputs, [torch.zeros_like(output) for output in outputs])
    return memory.peak


def _loss_bytes(module: Distiller, inputs: StepInputs, num_positions: int, autocast: Callable[[], Any]) -> int:
    """Return the bytes of the loss of ``num_positions``, with the teacher's rows in the batch."""
    hidden_PD = inputs.hidden_PD
    chunk = module.objective.chunk_positions or default_chunk_positions(hidden_PD.device, module.student.vocab_size)
    size = min(chunk, num_positions, inputs.num_positions)
    whole, half = (_loss_peak(module, inputs.leaves(count), autocast) for count in (size, (size + 1) // 2))
    per_position = (whole - half) / max(size // 2, 1)
    # Beyond a chunk: the selected hidden states, their gradient, and both once more as copies or in other dtypes.
    further = 4 * hidden_PD.shape[1] * hidden_PD.element_size()
    in_chunk, beyond = min(chunk, num_positions) - size, max(num_positions - chunk, 0)
    # The batch holds the teacher's rows, and valid ones are copied out of it.
    return round(whole + per_position * in_chunk + further * beyond + 2 * _row_bytes(inputs) * num_positions)


def _loss_peak(module: Distiller, inputs: StepInputs, autocast: Callable[[], Any]) -> int:
    with AllocatedBytes() as memory:
        inputs.backward(module.objective, module.student, autocast)
    return memory.peak


def _shards_bytes(cache: Cache, hidden: Sequence[str]) -> int:
    """Return the bytes of the encoded shards that are open at once."""
    mean_bytes = cache.encoded_bytes(hidden) / max(cache.manifest.num_shards, 1)
    return round(max(mean_bytes, min(mean_bytes * min(cache.max_open_shards, cache.manifest.num_shards), OPEN_BYTES)))


def _row_bytes(inputs: StepInputs) -> int:
    tensors = [getattr(inputs.rows, field.name) for field in fields(inputs.rows)]
    tensors += inputs.states.teacher.values()
    return _nbytes(tensor for tensor in tensors if tensor is not None) // max(inputs.num_positions, 1)


def _nbytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _resident_bytes() -> int:
    return int(psutil.Process().memory_info().rss)


def _free_bytes(device: torch.device) -> int | None:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available) if device.type == "cpu" else None
