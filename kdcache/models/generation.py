"""Write texts with encoder-decoders: by beam search, greedily, or with tokens chosen by a function.

The settings given here and the model's own generation settings (such as BART's first token) decide everything. Ids
beyond the tokenizer's vocabulary, for which many models have rows, are never written.

Shape suffixes: B inputs of a batch, L tokens of the longest, V vocabulary.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdcache.models.batching import batches_by_length
from kdcache.models.loading import quiet
from kdcache.models.tokenizer import pad_id_of
from kdcache.tasks.base import padded_inputs

#: From the numbers of a batch's inputs to the function that chooses its tokens.
ChooserOf = Callable[[list[int]], "Chooser"]
#: From the number of tokens written so far and the logits [B, V] of the next ones to the ids [B] to write.
Chooser = Callable[[int, Tensor], Tensor]


@dataclass(frozen=True)
class WrittenText:
    """A text without special tokens, its number of tokens, and whether it was cut before its end."""

    text: str
    num_tokens: int
    is_cut: bool


def generation_settings(model: Any) -> dict[str, Any]:
    """Return the generation settings of a checkpoint as plain values."""
    settings: dict[str, Any] = model.generation_config.to_diff_dict()
    settings.pop("transformers_version", None)
    return settings


def write_all(
    model: Any,
    tokenizer: Any,
    vocab_size: int,
    inputs: Sequence[NDArray[np.uint32]],
    *,
    max_tokens: int,
    batch_tokens: int,
    beams: int = 1,
    chooser_of: ChooserOf | None = None,
    equal_lengths: bool = False,
) -> list[WrittenText]:
    """Write one text for each of ``inputs``, in their order; batches are of similar length.

    ``batch_tokens`` bounds the padded tokens of the encoder's input (a single input may exceed it). With
    ``equal_lengths`` the inputs of a batch are of one length, for models that see padding.
    """
    found: dict[int, WrittenText] = {}
    batches = batches_by_length(np.array([len(tokens) for tokens in inputs], np.int64), batch_tokens)
    if equal_lengths:
        batches = [list(same) for one in batches for _, same in itertools.groupby(one, lambda n: len(inputs[n]))]
    for batch in batches:
        choose = None if chooser_of is None else chooser_of(batch)
        written = write_texts(
            model, tokenizer, vocab_size, [inputs[n] for n in batch], max_tokens=max_tokens, beams=beams, choose=choose
        )
        found |= dict(zip(batch, written, strict=True))
    return [found[n] for n in range(len(inputs))]


@torch.inference_mode()
def write_texts(
    model: Any,
    tokenizer: Any,
    vocab_size: int,
    inputs: Sequence[NDArray[np.uint32]],
    *,
    max_tokens: int,
    beams: int = 1,
    choose: Chooser | None = None,
) -> list[WrittenText]:
    """Write one text for each of ``inputs`` (tokens of the encoder's input) in one batch.

    A text has at most ``max_tokens`` tokens; the last one of a complete text is EOS. ``choose`` chooses every token,
    and then there is one beam.
    """
    pad_id = pad_id_of(tokenizer)
    device = next(model.parameters()).device
    fed = {name: torch.from_numpy(array).to(device) for name, array in padded_inputs(list(inputs), pad_id).items()}
    settings = copy.deepcopy(model.generation_config)
    settings.update(
        forced_eos_token_id=None,
        max_length=None,
        max_new_tokens=max_tokens,
        num_beams=1 if choose is not None else beams,
        num_return_sequences=1,
        do_sample=False,
        pad_token_id=pad_id,
    )
    with quiet(), _no_forced_end(model):
        ids_BL = model.generate(**fed, generation_config=settings, logits_processor=[_Allow(vocab_size, choose)])
    # The first token begins the decoder's input; in some families it is the token that ends a text as well.
    return [_text(ids[1:], tokenizer, pad_id, settings.eos_token_id) for ids in ids_BL.tolist()]


@contextlib.contextmanager
def _no_forced_end(model: Any) -> Iterator[None]:
    """Keep a model from forcing EOS at the longest length, as BART's settings do: a cut text would seem complete."""
    own = model.generation_config.forced_eos_token_id
    model.generation_config.forced_eos_token_id = None  # replaces settings that are None
    try:
        yield
    finally:
        model.generation_config.forced_eos_token_id = own


class _Allow:
    """Forbid ids that the tokenizer does not have; with a chooser also all but the chosen one.

    So the library's greedy search becomes, for example, a sampler.
    """

    def __init__(self, vocab_size: int, choose: Chooser | None) -> None:
        self._vocab_size, self._choose = vocab_size, choose

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores_BV = scores.clone()
        scores_BV[:, self._vocab_size :] = -torch.inf
        if self._choose is None:
            return scores_BV
        ids_B = self._choose(input_ids.shape[1] - 1, scores_BV)
        return torch.full_like(scores_BV, -torch.inf).scatter_(1, ids_B[:, None], 0.0)


def _text(ids: list[int], tokenizer: Any, pad_id: int, eos_id: int | list[int] | None) -> WrittenText:
    ends = {eos_id} if isinstance(eos_id, int) else set(eos_id or ())
    stop = next((n for n, token in enumerate(ids) if token in ends), None)
    num_tokens = len(ids) if stop is None else stop + 1
    text = tokenizer.decode(ids[:num_tokens], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return WrittenText(text, num_tokens, stop is None)
