"""Models whose answer to a text depends on the padding of its batch, and how they are run exactly.

Most architectures mask padding everywhere. Some mix it in: FNet transforms it, ConvBERT and MobileBERT see it beside
the last token, XLNet reads the last column of a batch, ProphetNet is shifted by the padding of its targets. Whether a
model does is found by trying: the same texts alone, beside others of their length, and beside longer ones. A model that
is exact beside others of the same length is run in groups of equal length (`EqualLengths`), so that it never sees
padding; one that is not (its answers depend on the other texts, or on chance) is refused.

Shape suffixes: B texts of a batch, L tokens of the longest one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kdcache.errors import KdcacheError
from kdcache.models.bi_encoder import BiEncoder
from kdcache.models.bodies import BodyOutput, HeadInput, Logits, Pooled, context_length, num_input_ids
from kdcache.models.trying import in_eval_mode
from kdcache.tasks.base import pad, padded_inputs

log = logging.getLogger(__name__)

#: Lengths of the texts that are tried, and of their targets for encoder-decoders.
_LENGTHS, _TARGET_LENGTHS = (3, 4, 6, 9, 16), (5, 2, 9, 3, 4)
#: Rounding in another batch shape, as a share of the largest number; more in dtypes that hold less.
_ROUNDING = 1e-3
_SLIGHT = 1e-4

Inputs = dict[str, Tensor]
Reads = Literal["nothing", "padding", "neighbours", "chance"]


class EqualLengths:
    """A body that is fed the texts of each length for themselves, and gives the grid of the whole batch."""

    def __init__(self, body: Callable[..., Any]) -> None:
        self.body = body

    def __call__(
        self, *, attention_mask: Tensor | None = None, target_mask: Tensor | None = None, **inputs: Any
    ) -> Any:
        """Run the body; without a mask (packed windows) nothing is known to be padding, and the batch goes as it is."""
        if attention_mask is None:
            return self.body(**inputs)
        tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
        others = {name: value for name, value in inputs.items() if name not in tensors}
        tensors["attention_mask"] = attention_mask
        lengths = {"": attention_mask.sum(1), "target": _target_lengths(tensors, target_mask)}
        keys_BX = torch.stack([length_B for length_B in lengths.values() if length_B is not None], 1)
        groups = [torch.nonzero((keys_BX == key).all(1)).flatten() for key in keys_BX.unique(dim=0)]
        parts = []
        for rows in groups:
            cut = {name: _cut(name, value, rows, lengths) for name, value in tensors.items()}
            parts.append(self.body(**cut, **others))
        width = tensors["target_ids"].shape[1] if "target_ids" in tensors else attention_mask.shape[1]
        return _assemble(parts, torch.cat(groups).argsort(), width)


def _target_lengths(tensors: Inputs, target_mask: Tensor | None) -> Tensor | None:
    if "target_ids" not in tensors:
        return None
    targets = tensors["target_ids"]
    return targets.new_full((len(targets),), targets.shape[1]) if target_mask is None else target_mask.sum(1)


def _cut(name: str, value: Tensor, rows: Tensor, lengths: dict[str, Tensor | None]) -> Tensor:
    length_B = lengths["target" if name.startswith("target") else ""]
    assert length_B is not None
    return value[rows, : int(length_B[rows[0]])]


def _assemble(parts: list[Any], order: Tensor, width: int) -> BodyOutput:
    def whole(states: list[Tensor]) -> Tensor:
        if any(state.shape[1] > 1 for state in states):  # else there is one column, for the whole text
            states = [nn.functional.pad(state, (0, 0, 0, width - state.shape[1])) for state in states]
        return torch.cat(states)[order]

    layers = [getattr(part, "hidden_states", None) for part in parts]
    every = None
    if all(states is not None for states in layers):
        every = tuple(whole(list(states)) for states in zip(*layers, strict=True))
    return BodyOutput(whole([part.last_hidden_state for part in parts]), every)


def without_padding(body: Callable[..., Any], model: Any, name: str, error: type[KdcacheError]) -> Callable[..., Any]:
    """Return ``body`` so that it is exact in batches of texts of any lengths.

    Raises ``error`` for a model whose answers depend on the other texts of a batch, or on chance.
    """
    if isinstance(body, BiEncoder):  # it takes the two texts apart, and feeds each by itself
        body.encode = without_padding(body.encode, model, name, error)
        return body
    found = reads(body, model)
    called = f"{name} ({type(model).__name__})"
    if found == "chance":
        raise error(f"{called} answers the same text differently each time; use another architecture")
    if found == "neighbours":
        raise error(
            f"{called} answers a text differently beside other texts, so its answers would depend on the batch; use "
            "another architecture"
        )
    if found == "nothing":
        return body
    log.warning(
        "%s answers a text differently beside longer ones: texts of each length are run by themselves, which is exact "
        "but slower",
        called,
    )
    return EqualLengths(body)


@torch.no_grad()
def reads(body: Callable[..., Any], model: Any) -> Reads:
    """Return what the states of a text depend on besides the text, by trying; in eval mode."""
    probe = _Probe(body, model)
    with in_eval_mode(model):
        if probe.is_causal:
            # Padding comes after every token of a text, so this only tells the few that are causal not quite.
            found = probe.reads((0, len(probe.lengths) - 1))
            found = found if found == "nothing" else probe.reads(range(len(probe.lengths)))
            return "padding" if found == "padding" else "nothing"
        return probe.reads(range(len(probe.lengths)))


class _Probe:
    """A few short texts, whose answers alone are compared with those in batches."""

    def __init__(self, body: Callable[..., Any], model: Any) -> None:
        self._body, self._device = body, next(model.parameters()).device
        config = model.config.get_text_config()
        self.is_causal = not isinstance(body, HeadInput | Logits | Pooled) and body is not model
        self._eos = getattr(config, "eos_token_id", None) if config.is_encoder_decoder else None
        self._has_targets = bool(config.is_encoder_decoder) and isinstance(body, HeadInput)
        most = context_length(model) or max(_LENGTHS)
        self.lengths = [length for length in _LENGTHS if length <= most] or [most]
        special = [getattr(config, name, None) for name in ("pad_token_id", "eos_token_id", "bos_token_id")]
        num_ids = num_input_ids(model)
        # From the middle of the vocabulary: rows at its end may be padding, those at its beginning special tokens.
        self._ids = [n % num_ids for n in range(num_ids // 2, num_ids // 2 + 40) if n % num_ids not in special] or [0]

    def reads(self, chosen: Iterable[int]) -> Reads:
        chosen = list(chosen)
        alone = [self._states([n]) for n in chosen]
        if not all(states.isfinite().all() for states in alone):
            return "nothing"  # reported when the model is used, with the position
        size = max(float(states.abs().max()) for states in alone)
        eps = 16 * torch.finfo(alone[0].dtype).eps
        beside = _difference(alone, [self._states([n], shifts=(0, 7)) for n in chosen])
        if beside > max(_ROUNDING, eps) * size:
            again = _difference(alone, [self._states([n]) for n in chosen])
            return "chance" if again > max(_ROUNDING, eps) * size else "neighbours"
        together = self._states(chosen)
        padded = _difference(alone, [together[row : row + 1] for row in range(len(chosen))])
        return "padding" if padded > max(max(_SLIGHT, eps) * size, 8 * beside) else "nothing"

    def _states(self, numbers: list[int], shifts: tuple[int, ...] = (0,)) -> Tensor:
        """Return the states of texts in one batch; with ``shifts`` further texts of the same lengths stand in it."""
        texts = [self._text(self.lengths[n], n + shift) for n in numbers for shift in shifts]
        if self._eos is not None:  # by which such classifiers find the end of a text
            texts = [np.append(text[:-1], np.uint32(self._eos)) for text in texts]
        inputs = padded_inputs(texts, 0)
        if self._has_targets:
            targets = [self._text(_TARGET_LENGTHS[n], 20 + n + shift) for n in numbers for shift in shifts]
            inputs["target_ids"], real_BL = pad(targets, 0)
            inputs["target_mask"] = real_BL.astype(np.int64)
        fed = {name: torch.from_numpy(array).to(self._device) for name, array in inputs.items()}
        return self._body(**fed).last_hidden_state

    def _text(self, length: int, start: int) -> NDArray[np.uint32]:
        return np.resize(np.roll(np.array(self._ids, np.uint32), -start), length)


def _difference(alone: list[Tensor], others: list[Tensor]) -> float:
    """Return the largest difference between states of texts alone and those of the first row of others."""
    pairs = zip(alone, others, strict=True)
    return max(float((a[0].float() - b[0, : a.shape[1]].float()).abs().max()) for a, b in pairs)
