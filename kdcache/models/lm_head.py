"""Split a causal language model into a body that returns hidden states and an LM head that returns logits.

Logits of many positions come from the head in chunks, so that no [positions, vocabulary] array exists for a whole
batch. The split is checked, not assumed: `split_model` runs both ways on a few tokens and rejects the split if they
disagree, because families add scales and soft caps between head and loss.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from kdcache.cache.head_file import check_head
from kdcache.errors import CorruptCacheError
from kdcache.models.trying import in_eval_mode


@dataclass(frozen=True)
class LMHead:
    """The map from hidden states to logits: ``cap(scale * (hidden @ weight.T + bias))``.

    ``weight_VD`` and ``bias_V`` are the model's own parameters (tied or not), so gradients reach them.
    """

    weight_VD: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    @property
    def vocab_size(self) -> int:
        """Number of rows of the head, V."""
        return self.weight_VD.shape[0]

    def of(self, linear: Any) -> LMHead:
        """Return the head with the parameters that ``linear`` has now."""
        return replace(self, weight_VD=linear.weight, bias_V=getattr(linear, "bias", None))

    def to(self, device: torch.device | str) -> LMHead:
        """Return the head on ``device``."""
        bias = None if self.bias_V is None else self.bias_V.to(device)
        return replace(self, weight_VD=self.weight_VD.to(device), bias_V=bias)

    def narrow(self, vocab_size: int) -> LMHead:
        """Return the head over the first ``vocab_size`` ids only (views: padding rows are never multiplied)."""
        bias = None if self.bias_V is None else self.bias_V[:vocab_size]
        return LMHead(self.weight_VD[:vocab_size], bias, self.scale, self.softcap)

    def logits(self, hidden_PD: Tensor, out: Tensor | None = None) -> Tensor:
        """Return logits [P, V] of hidden states [P, D], in the dtype of the model; in ``out`` where that is given."""
        if out is None:
            return self.finish(nn.functional.linear(hidden_PD, self.weight_VD, self.bias_V))
        torch.mm(hidden_PD, self.weight_VD.T, out=out)
        if self.bias_V is not None:
            out += self.bias_V
        return self.finish(out)

    def finish(self, logits_PV: Tensor) -> Tensor:
        """Apply the family's scale and soft cap to the product of hidden states and weights."""
        if self.scale != 1.0:
            logits_PV = logits_PV * self.scale
        if self.softcap is not None:
            logits_PV = self.softcap * torch.tanh(logits_PV / self.softcap)
        return logits_PV


class BufferedHead:
    """A head that writes its logits into one array, chunk after chunk.

    Page faults of new memory would cost a tenth of the product.
    """

    def __init__(self, head: LMHead) -> None:
        self.head = head
        self._buffer: Tensor | None = None

    @torch.inference_mode()
    def logits(self, hidden_PD: Tensor, start: int, stop: int) -> Tensor:
        """Return the logits of rows ``start`` to ``stop``, in their dtype; valid until the next call."""
        num_rows, buffer = stop - start, self._buffer
        if buffer is None or len(buffer) < num_rows or buffer.dtype != hidden_PD.dtype:
            buffer = hidden_PD.new_empty(num_rows, self.head.vocab_size)
            self._buffer = buffer
        return self.head.logits(hidden_PD[start:stop], out=buffer[:num_rows])


def head_to_bytes(head: LMHead) -> bytes:
    """Return ``head`` as a safetensors file: ``weight`` [V, D], ``bias`` [V] if there is one; scale and cap as
    metadata.
    """
    tensors = {"weight": head.weight_VD} | ({} if head.bias_V is None else {"bias": head.bias_V})
    # Of their own, on the CPU: a view of a larger or a tied weight would be written whole or refused.
    tensors = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    settings = {"scale": head.scale, "softcap": head.softcap}
    data: bytes = save(tensors, metadata={"lm_head": json.dumps(settings)})
    return data


def head_from_bytes(data: bytes) -> LMHead:
    """Return the head in a file that `head_to_bytes` made; raises ``CorruptCacheError``.

    The file may be anybody's, so it is checked first (`kdcache.cache.head_file`).
    """
    check_head(data)
    try:
        tensors = load(data)
    except SafetensorError as error:
        raise CorruptCacheError(f"the teacher's LM head cannot be read: {error!r}") from None
    length = int.from_bytes(data[:8], "little")
    settings = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["lm_head"])
    scale, softcap = float(settings["scale"]), settings["softcap"]
    return LMHead(tensors["weight"], tensors.get("bias"), scale, None if softcap is None else float(softcap))


def same_head(first: LMHead, second: LMHead) -> bool:
    """Return whether two heads are equal: weights and bias to the bit, scale and cap."""
    settings = [(head.scale, head.softcap, head.bias_V is None) for head in (first, second)]
    if settings[0] != settings[1]:
        return False
    pairs = [(first.weight_VD, second.weight_VD), (first.bias_V, second.bias_V)]
    return all(a is None or b is None or (a.dtype == b.dtype and torch.equal(a.cpu(), b.cpu())) for a, b in pairs)


def split_model(model: Any) -> tuple[nn.Module, LMHead] | None:
    """Split a Hugging Face causal LM into its body and `LMHead`; None if they do not reproduce its logits.

    The body takes the usual inputs; the head turns the ``last_hidden_state`` of its output into logits.
    """
    output_embeddings = model.get_output_embeddings()
    body = model.base_model
    if output_embeddings is None or body is model:
        return None
    config = model.config.get_text_config()
    scale = 1.0
    if getattr(config, "logit_scale", None):  # Cohere multiplies
        scale = float(config.logit_scale)
    elif getattr(config, "logits_scaling", None):  # Granite divides
        scale = 1.0 / float(config.logits_scaling)
    head = LMHead(
        output_embeddings.weight,
        getattr(output_embeddings, "bias", None),
        scale,
        getattr(config, "final_logit_softcapping", None) or getattr(config, "logits_soft_cap", None),
    )
    return (body, head) if reproduces(model, body, head, {"use_cache": False}, {"use_cache": False}) else None


@torch.no_grad()
def reproduces(
    model: Any, body: Callable[..., Any], head: LMHead, fed_body: Mapping[str, Any], fed_model: Mapping[str, Any]
) -> bool:
    """Return whether ``head`` turns the states of ``body`` into the logits of ``model``, by trying a few tokens.

    ``fed_body`` and ``fed_model`` are further inputs of each.
    """
    device = head.weight_VD.device
    probe = torch.arange(8, device=device).remainder(head.vocab_size)[None]
    with in_eval_mode(model):
        expected = model(input_ids=probe, **fed_model).logits.float()
        states = body(input_ids=probe, **fed_body).last_hidden_state
        if states.shape[-1] != head.weight_VD.shape[1]:
            return False  # the head multiplies by something else (MobileBERT's has two matrices)
        found = head.logits(states).float()
    if found.shape != expected.shape:
        return False
    comparable = expected.isfinite() & found.isfinite()
    if not comparable.any():
        return True  # NaN weights: reported when the model is used, with the position
    found, expected = found[comparable], expected[comparable]
    # In another batch shape the product may round differently by one or two units of the model's dtype.
    # The mean finds a cap or scale that was not read: in bfloat16 a few units of the largest logit would hide it.
    difference, eps = (found - expected).abs(), torch.finfo(head.weight_VD.dtype).eps
    return bool(
        difference.max() <= 16 * eps * expected.abs().max() and difference.mean() <= eps * expected.abs().mean()
    )
