"""Models of every task behind one interface: a body that returns a grid of states, and a head over the states.

A teacher or a student is run as ``body(**inputs).last_hidden_state``, [B, L, D]. The positions of a task are cells of
that grid, and ``head`` turns a state into the outputs of the task. So code that runs models need not know their task:

- ``tokens``: a causal model without its LM head; a state per token;
- ``head-input``: masked and encoder-decoder models, whose heads do more than multiply: a state per token is the input
  of the last matrix of the head, which the model without that matrix returns;
- ``logits``: classifiers, regressors and cross-encoders; the state *is* the logits (the head is the identity), so that
  every architecture works; for a model that predicts per sequence, and not per token, the grid has one column;
- ``pooled``: embeddings; one column, and the state is the pooled, perhaps normalised vector;
- ``bi-encoder``: students of cross-encoders that read query and document apart; one column, the state is the score.

Where the grid has one column, so have the states of middle layers: of the first token, or pooled in the same way.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kdcache.errors import ConfigError
from kdcache.models.bi_encoder import BiEncoder
from kdcache.models.lm_head import LMHead, reproduces, split_model
from kdcache.models.pooling import pool, project, vector_width
from kdcache.schema import OutputsRecord

#: Families whose position ids begin after that of padding.
_COUNT_FROM_PAD = ("roberta", "xlm-roberta", "camembert", "mpnet", "longformer", "xlm-roberta-xl", "data2vec-text")

#: Inputs of models in a batch; a model gets those that its forward takes.
MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids", "token_type_ids", "target_ids", "target_mask")


@dataclass
class BodyOutput:
    """States [B, L, D] at the cells of the grid: of the last layer, and on request of all from the embeddings on."""

    last_hidden_state: Tensor
    hidden_states: tuple[Tensor, ...] | None = None


@dataclass(frozen=True)
class Parts:
    """A model as body and head.

    ``head()`` makes the head of the model's current parameters. ``last_is_state`` says whether the input of the head is
    the state of the last layer; otherwise that state stands in ``hidden_states``, as those of the other layers do.
    """

    body: Callable[..., Any]
    head: Callable[[], LMHead]
    last_is_state: bool = True


def fed(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the inputs of a model in a collated batch."""
    return {name: batch[name] for name in MODEL_INPUTS if name in batch}


def split_for(row: str, model: Any, outputs: OutputsRecord | None) -> Parts | None:
    """Return ``model`` as the body called ``row`` in `BODIES`; None where it cannot be split in this way."""
    return BODIES[row](model, outputs)


def num_input_ids(model: Any) -> int:
    """Return the number of ids that a model can be fed: the rows of its embeddings."""
    embeddings = model.get_input_embeddings()
    found = getattr(embeddings, "num_embeddings", None)  # I-BERT's quantised ones have a weight only
    return int(embeddings.weight.shape[0] if found is None else found)


def num_layers(model: Any) -> int:
    """Return the number of layers after the embeddings whose states `BodyOutput.hidden_states` has."""
    config = model.config.get_text_config()
    of_decoder = getattr(config, "num_decoder_layers", None) or getattr(config, "decoder_layers", None)
    return int(of_decoder if config.is_encoder_decoder and of_decoder else config.num_hidden_layers)


def context_length(model: Any) -> int | None:
    """Return the most tokens that a model was made for; None where its configuration names no limit."""
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit <= 0:
        return None
    # RoBERTa and similar models count positions from after the padding id, with embeddings for those before it too.
    pad_id = getattr(model.get_input_embeddings(), "padding_idx", None) or 0
    return limit - pad_id - 1 if getattr(config, "model_type", "") in _COUNT_FROM_PAD else limit


def probe_inputs(model: Any) -> dict[str, Tensor]:
    """Return two tokens as inputs for the body of any task, to see its outputs."""
    device = next(model.parameters()).device
    tokens = torch.zeros(1, 2, dtype=torch.int64, device=device)
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    return inputs | ({"target_ids": tokens} if model.config.is_encoder_decoder else {})


def identity_head(width: int, like: Tensor) -> LMHead:
    """Return a head that changes nothing, for states that are logits already; in dtype and device of ``like``."""
    return _identity(width, like.dtype, like.device)


@functools.cache
def _identity(width: int, dtype: torch.dtype, device: torch.device) -> LMHead:
    # Made once: every step needs it, and for a wide embedding it is a large matrix.
    with torch.inference_mode(False):
        return LMHead(torch.eye(width, dtype=dtype, device=device))


def _tokens(model: Any, outputs: OutputsRecord | None) -> Parts | None:
    split = split_model(model)
    if split is None:
        return None
    body, head = split
    return Parts(functools.partial(body, use_cache=False), lambda: head.of(model.get_output_embeddings()))


class Whole:
    """A causal model whose LM head cannot be split off: its logits are the states."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, *, output_hidden_states: bool = False, **inputs: Any) -> BodyOutput:
        """Run the model."""
        output = self.model(**inputs, use_cache=False, output_hidden_states=output_hidden_states)
        return BodyOutput(output.logits, output.hidden_states)


class HeadInput:
    """A model without the last matrix of its head: the input of that matrix is the state."""

    def __init__(self, model: Any, added: list[_Added]) -> None:
        self.model, self._added = model, added
        self._takes_targets = bool(model.config.is_encoder_decoder)

    def __call__(
        self, *, target_ids: Tensor | None = None, target_mask: Tensor | None = None, **inputs: Any
    ) -> BodyOutput:
        """Run the model; ``target_ids`` [B, L] are those of an encoder-decoder's targets, of which it is fed all but
        the last, behind the token that it begins with. ``target_mask`` is for bodies around this one: padding comes
        after all tokens of a target, so most decoders do not see it."""
        if self._takes_targets:
            assert target_ids is not None
            inputs |= {"decoder_input_ids": _shifted(target_ids, self.model), "use_cache": False}
        with _skipping_head(self.model.get_output_embeddings(), self._added):
            output = self.model(**inputs)
        states = output.decoder_hidden_states if self._takes_targets else output.hidden_states
        return BodyOutput(output.logits, states)


def _shifted(target_ids_BL: Tensor, model: Any) -> Tensor:
    first = _first_id(model)
    return torch.cat([target_ids_BL.new_full((len(target_ids_BL), 1), first), target_ids_BL[:, :-1]], 1)


def _first_id(model: Any) -> int:
    configs = (model.config, getattr(model, "generation_config", None))
    found = [getattr(config, "decoder_start_token_id", None) for config in configs]
    for token_id in found:
        if token_id is not None:
            return int(token_id)
    raise ConfigError(
        f"the configuration of {model.config.name_or_path or type(model).__name__} has no decoder_start_token_id, so "
        "its decoder cannot be begun; add it to config.json (T5: the id of padding)"
    )


@dataclass(frozen=True)
class _Added:
    """A bias that a model adds to the product of its last matrix, outside of that: of BART, of ESM."""

    owner: nn.Module
    name: str

    @property
    def bias_V(self) -> Tensor:
        return getattr(self.owner, self.name).flatten()

    @contextlib.contextmanager
    def left_out(self) -> Iterator[None]:
        """Let the model add nothing for a while."""
        own = getattr(self.owner, self.name)
        nothing = own.detach().new_zeros(1)
        is_parameter = isinstance(own, nn.Parameter)
        setattr(self.owner, self.name, nn.Parameter(nothing, requires_grad=False) if is_parameter else nothing)
        try:
            yield
        finally:
            setattr(self.owner, self.name, own)


def _added(model: Any, linear: Any) -> list[_Added]:
    """Return the biases of the width of the vocabulary that stand beside the last matrix, and are not its own."""
    around = [module for module in model.modules() if any(child is linear for child in module.children())]
    found = []
    for owner in dict.fromkeys([model, *around]):
        for name, tensor in (*owner.named_parameters(recurse=False), *owner.named_buffers(recurse=False)):
            if tensor is getattr(linear, "bias", None):
                continue
            if tensor.numel() == tensor.shape[-1:].numel() == linear.weight.shape[0]:
                found.append(_Added(owner, name))
    return found


@contextlib.contextmanager
def _skipping_head(linear: Any, added: list[_Added]) -> Iterator[None]:
    """Let the last matrix of a model return its input for a while, with nothing ``added`` to it."""
    linear.forward = lambda states: states
    try:
        with contextlib.ExitStack() as stack:
            for bias in added:
                stack.enter_context(bias.left_out())
            yield
    finally:
        del linear.forward


def _head_of(linear: Any, added: list[_Added]) -> LMHead:
    """Return the last matrix with what is added to its product."""
    biases = [bias for bias in (getattr(linear, "bias", None), *(one.bias_V for one in added)) if bias is not None]
    return LMHead(linear.weight, functools.reduce(torch.add, biases) if biases else None)


def _head_input(model: Any, outputs: OutputsRecord | None) -> Parts | None:
    linear: Any = model.get_output_embeddings()
    # The matrix of FSMT is the decoder's embedding itself, which cannot be left out.
    if not isinstance(linear, nn.Module) or isinstance(linear, nn.Embedding):
        return None
    probe: dict[str, Tensor] = {}
    same: dict[str, Tensor] = {}
    if model.config.is_encoder_decoder:
        probe = {"target_ids": torch.arange(6, device=next(model.parameters()).device)[None]}
        same = {"decoder_input_ids": _shifted(probe["target_ids"], model)}
    beside = _added(model, linear)
    for added in (beside, []) if beside else ([],):
        body = HeadInput(model, added)
        with _noticeable(added):
            if not reproduces(model, body, _head_of(linear, added), fed_body=probe, fed_model=same):
                continue
        return Parts(body, functools.partial(_current_head, model, added))
    return None


def _current_head(model: Any, added: list[_Added]) -> LMHead:
    return _head_of(model.get_output_embeddings(), added)


@contextlib.contextmanager
def _noticeable(added: list[_Added]) -> Iterator[None]:
    """Make biases different from zero for a while: whether a model uses them cannot be seen of zeros."""
    with torch.no_grad():
        own = [bias.bias_V.clone() for bias in added]
        for bias in added:
            bias.bias_V.copy_(torch.linspace(-1, 1, len(bias.bias_V)))
    try:
        yield
    finally:
        with torch.no_grad():
            for bias, tensor in zip(added, own, strict=True):
                bias.bias_V.copy_(tensor)


class Logits:
    """A model whose state is its logits: one vector for each sequence (one column), or for each token.

    A decoder predicts for a sequence at its last token, an encoder usually at its first.
    """

    def __init__(self, model: Any, *, pair_types: bool = True) -> None:
        self.model = model
        self._takes = _taken(model) - (set() if pair_types else {"token_type_ids"})
        self._pooling = "last" if hasattr(model, "score") else "cls"  # the name of every decoder's head

    def __call__(self, *, input_ids: Tensor, attention_mask: Tensor, **inputs: Any) -> BodyOutput:
        """Run the model; where there is one column, states of middle layers are those of the token it answers at."""
        inputs = {name: value for name, value in inputs.items() if name in self._takes}
        with _padding(self.model, input_ids, attention_mask) as padded_BL:
            logits, states = self._run(padded_BL, attention_mask, inputs)
        if logits.ndim == 3:
            return BodyOutput(logits, states)
        pooled = None if states is None else tuple(pool(s, attention_mask, self._pooling)[:, None] for s in states)
        return BodyOutput(logits[:, None], pooled)

    def _run(self, ids_BL: Tensor, mask_BL: Tensor, inputs: dict[str, Any]) -> tuple[Tensor, Any]:
        """Return logits, and the states of all layers or None.

        An encoder-decoder answers at the last EOS of a text, and the library asks that all texts of a batch have
        equally many of them, which single texts and pairs have not: each kind is run for itself, without states.
        """
        if self.model.config.is_encoder_decoder:
            ends_B = ((ids_BL == self.model.config.eos_token_id) & (mask_BL == 1)).sum(1)
            groups = [torch.nonzero(ends_B == count).flatten() for count in ends_B.unique()]
            if len(groups) > 1:
                parts = [self.model(input_ids=ids_BL[g], attention_mask=mask_BL[g]).logits for g in groups]
                return torch.cat(parts)[torch.cat(groups).argsort()], None
        output = self.model(input_ids=ids_BL, attention_mask=mask_BL, **inputs)
        return output.logits, getattr(output, "hidden_states", None)


@contextlib.contextmanager
def _padding(model: Any, input_ids_BL: Tensor, attention_mask_BL: Tensor) -> Iterator[Tensor]:
    """Yield the ids, with padding that the model recognises.

    A decoder finds the last token of a text by the id of padding, not by the mask. A decoder without such an id (GPT-2,
    most Llamas) temporarily gets one that none of these texts ends with.
    """
    config = model.config.get_text_config()
    own = getattr(config, "pad_token_id", None)
    pad_id = int(own) if own is not None else _unused_at_ends(input_ids_BL, attention_mask_BL)
    config.pad_token_id = pad_id
    try:
        yield input_ids_BL.masked_fill(attention_mask_BL == 0, pad_id)
    finally:
        config.pad_token_id = own


def _unused_at_ends(input_ids_BL: Tensor, attention_mask_BL: Tensor) -> int:
    ends = set(pool(input_ids_BL[:, :, None], attention_mask_BL, "last").flatten().tolist())
    return next(n for n in range(len(ends) + 1) if n not in ends)


def _taken(model: Any) -> set[str]:
    """Return the names of the inputs that a model takes."""
    # Newer families take the latter through **kwargs.
    names = set(inspect.signature(model.forward).parameters) | {"output_hidden_states"}
    # RoBERTa and similar models take token types, but have no embedding for that of the second text.
    if getattr(model.config, "type_vocab_size", 0) < 2:
        names.discard("token_type_ids")
    return names


def _logits(model: Any, outputs: OutputsRecord | None) -> Parts | None:
    width = int(model.config.num_labels)
    body = Logits(model, pair_types=outputs is None or outputs.pair_types)
    return Parts(body, lambda: identity_head(width, next(model.parameters())), False)


class Pooled:
    """A model whose token states are pooled into one vector: the state of a grid with one column."""

    def __init__(self, model: Any, pooling: str, normalise: bool) -> None:
        self.model, self._pooling, self._normalise = model, pooling, normalise
        self._takes = _taken(model)

    def __call__(self, *, attention_mask: Tensor, **inputs: Any) -> BodyOutput:
        """Run the model; states of middle layers are pooled alike, and not normalised."""
        output = self.model(
            attention_mask=attention_mask, **{name: value for name, value in inputs.items() if name in self._takes}
        )
        pooled_BD = project(self.model, pool(output.last_hidden_state, attention_mask, self._pooling))
        if self._normalise:
            pooled_BD = nn.functional.normalize(pooled_BD, dim=-1)
        states = getattr(output, "hidden_states", None)
        if states is not None:
            states = tuple(pool(state, attention_mask, self._pooling)[:, None] for state in states)
        return BodyOutput(pooled_BD[:, None], states)


def _pooled(model: Any, outputs: OutputsRecord | None) -> Parts | None:
    assert outputs is not None
    assert outputs.pooling is not None
    body = Pooled(model, outputs.pooling, bool(outputs.normalised))
    return Parts(body, lambda: identity_head(vector_width(model), next(model.parameters())), False)


def _bi_encoder(model: Any, outputs: OutputsRecord | None) -> Parts | None:
    return Parts(BiEncoder(model), lambda: identity_head(1, next(model.parameters())), False)


#: Every way to run a model, by the name that tasks use.
BODIES: dict[str, Callable[[Any, OutputsRecord | None], Parts | None]] = {
    "tokens": _tokens,
    "head-input": _head_input,
    "logits": _logits,
    "pooled": _pooled,
    "bi-encoder": _bi_encoder,
}
