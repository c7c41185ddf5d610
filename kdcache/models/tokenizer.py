"""Identify a tokenizer by content, and encode texts with it fast.

Token ids are the contract between cache and student, so two tokenizers are *the same* when they give every text the
same ids: vocabulary, merges, normaliser, pre-tokeniser and added tokens. Names, paths, chat templates, padding (many
recipes set the pad token to EOS), truncation, decoders and the post-processor are left out: they change how a tokenizer
is used, not what an id means. BOS and EOS are left out too, because an instruction-tuned model and its base often
differ in them: those of a text are among the cache's tokens already, and the record names their ids next to the hash.

Tokenizers without a `tokenizers` backend do not describe their rules; only vocabulary and class identify them, and a
warning says so.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import logging
import math
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from kdcache.errors import CacheError, ConfigError, shortened
from kdcache.schema import TokenizerRecord

logger = logging.getLogger(__name__)

#: How many times as long the decoder of a cache's tokenizer may make a text.
_MOST_GROWTH = 64

_PROBE = "a probe"
_MOST_PROBES = 64
_RULES = {"model": "model or merges", "normalizer": "normaliser", "pre_tokenizer": "pre-tokeniser"}


def tokenizer_record(tokenizer: Any) -> TokenizerRecord:
    """Describe a Hugging Face tokenizer by content.

    ``vocab_size`` is the true size: the highest id of vocabulary and added tokens, plus one.
    """
    description = _describe(tokenizer)
    canonical = json.dumps(description, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return TokenizerRecord(
        sha256=hashlib.sha256(canonical.encode()).hexdigest(),
        vocab_size=true_vocab_size(tokenizer),
        bos_id=tokenizer.bos_token_id,
        eos_id=tokenizer.eos_token_id,
        pad_id=tokenizer.pad_token_id,
    )


def true_vocab_size(tokenizer: Any) -> int:
    """Return the highest token id plus one, over vocabulary and added tokens."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def pad_id_of(tokenizer: Any) -> int:
    """Return an id to pad with; any will do, because padding is neither attended to nor trained on."""
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)


def describe_difference(a: Any, b: Any) -> list[str]:
    """Return in words how two tokenizers differ; empty exactly when their `tokenizer_record` hashes are equal."""
    first, second = _describe(a), _describe(b)
    if first == second:
        return []
    found = _vocabulary_differences(first["vocab"], second["vocab"])
    for rule, words in _RULES.items():
        if first["rules"].get(rule) != second["rules"].get(rule):
            found.append(f"{words} differs")
    if first["added_tokens"] != second["added_tokens"]:
        found.append("added tokens differ")
    return found or ["the tokenizers are of different classes"]


@dataclass
class SeenTokens:
    """Special tokens that stand in texts: texts that were encoded, those that begin with the tokenizer's own first
    token, and the texts with each other special token.
    """

    num_texts: int = 0
    num_doubled: int = 0
    written: Counter[int] = field(default_factory=Counter)


class TextEncoder:
    """Turn texts into token ids exactly as the tokenizer does, special tokens included.

    ``bos_id`` is set only if the tokenizer really begins a text with it (GPT-2 has a BOS token and never adds it).
    ``eos_id`` is the token that ends a text, whether or not the tokenizer adds it; ``appends_eos`` says whether
    `encode` ends every text with it. ``num_ids`` is that of the model, where it has fewer ids than the tokenizer.
    Without ``add_special_tokens`` texts get no special tokens but those that are written in them.
    """

    def __init__(self, tokenizer: Any, num_ids: int | None = None, *, add_special_tokens: bool = True) -> None:
        backend = _backend(tokenizer)
        self._tokenizer = tokenizer
        self._most_ids = num_ids
        # A copy: the caller may rely on the truncation and padding that are set in the tokenizer.
        self._backend = None if backend is None else copy.deepcopy(backend)
        if self._backend is not None:
            self._backend.no_truncation()
            self._backend.no_padding()
        self._adds = add_special_tokens
        self._probe, self._before, self._after = self._found_around()
        if not add_special_tokens:
            self._before, self._after = [], []
        self._written = self.special_ids - {tokenizer.unk_token_id}
        self.seen = SeenTokens()
        self.bos_id: int | None = self._before[0] if self._before else None
        self.appends_eos = bool(self._after)
        self.eos_id: int | None = self._after[-1] if self._after else tokenizer.eos_token_id

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Return one list of token ids per text, never truncated."""
        found = self._encode(texts, add_special_tokens=self._adds)
        self._look_at(found, len(self._before), len(self._after))
        return found

    @property
    def num_ids(self) -> int:
        """Number of token ids, the true size of the vocabulary."""
        own = true_vocab_size(self._tokenizer)
        return own if self._most_ids is None else min(own, self._most_ids)

    @property
    def mask_id(self) -> int | None:
        """The mask token; None if there is none."""
        mask_id: int | None = self._tokenizer.mask_token_id
        return mask_id

    @property
    def special_ids(self) -> frozenset[int]:
        """Tokens that are no text: those that begin, end, separate, pad or mask texts, and the unknown token."""
        return frozenset(self._tokenizer.all_special_ids)

    def encode_plain(self, texts: list[str]) -> list[list[int]]:
        """Return one list of token ids per text, without special tokens."""
        found = self._encode(texts, add_special_tokens=False)
        self._look_at(found, 0, 0)
        return found

    def _look_at(self, encoded: list[list[int]], num_before: int, num_after: int) -> None:
        """Count texts that have special tokens written out in them."""
        self.seen.num_texts += len(encoded)
        for ids in encoded:
            text = ids[num_before : len(ids) - num_after]
            if self._written.isdisjoint(text):
                continue
            is_doubled = text[:1] == self._before[-1:] != []
            self.seen.num_doubled += is_doubled
            self.seen.written.update(self._written.intersection(text[is_doubled:]))

    def special_tokens_seen(self, remedy: str) -> list[str]:
        """Say, in one line each, which special tokens the texts so far had written out; ``remedy`` is against a doubled
        first one.
        """
        seen, found = self.seen, []
        if seen.num_doubled:
            found.append(
                f"texts that begin with {self._name(self._before[-1])}, as chat templates write it: "
                f"{seen.num_doubled:,} of {seen.num_texts:,}. The tokenizer puts another one before each; {remedy}"
            )
        if seen.written and self._adds:
            token, count = seen.written.most_common(1)[0]
            found.append(
                f"texts with {self._name(token)} written out: {count:,} of {seen.num_texts:,}. It is read as this "
                "special token and not as text"
            )
        return found

    def _name(self, token_id: int) -> str:
        return shortened(self._tokenizer.convert_ids_to_tokens(token_id))

    def around(self, num_parts: int) -> list[list[int]]:
        """Return the special tokens before, between and after 1 or 2 texts that are fed together.

        Found by trying. Raises ``ConfigError`` for a tokenizer that does not put two texts one after another.
        """
        if num_parts == 1:
            return [self._before, self._after]
        if not self._adds:
            return [[], [], []]
        [plain] = self._encode([self._probe], add_special_tokens=False)
        joined = list(self._tokenizer(self._probe, self._probe, add_special_tokens=True)["input_ids"])
        starts = _places(plain, joined)
        if len(starts) != 2:
            raise ConfigError(
                f"the tokenizer ({type(self._tokenizer).__name__}) does not put two texts one after another, so it "
                "cannot encode pairs; use another tokenizer"
            )
        first, second = starts
        size = len(plain)
        return [joined[:first], joined[first + size : second], joined[second + size :]]

    @property
    def pair_types(self) -> bool:
        """Whether the second of two texts that are fed together has its own token type, as with BERT."""
        if self._backend is not None:
            types = self._backend.encode(self._probe, self._probe).type_ids
        else:
            pair = self._tokenizer(self._probe, self._probe, return_token_type_ids=True)
            types = pair.get("token_type_ids", [0])
        return max(types) > 0

    @cached_property
    def treats_targets_alike(self) -> bool:
        """Whether a decoder's text is encoded in the same way as an encoder's."""
        if hasattr(self._tokenizer, "tgt_lang"):  # even where none is set yet, and both would get the same code
            return False
        target: list[int] = self._tokenizer(text_target=self._probe)["input_ids"]
        return target == self._tokenizer(self._probe)["input_ids"]

    def _encode(self, texts: list[str], *, add_special_tokens: bool) -> list[list[int]]:
        if not texts:
            return []
        if self._backend is not None:
            encodings = self._backend.encode_batch_fast(texts, add_special_tokens=add_special_tokens)
            return [encoding.ids for encoding in encodings]
        # verbose=False: a text longer than the model's context is normal here, it is split into sequences later.
        encoded = self._tokenizer(texts, add_special_tokens=add_special_tokens, truncation=False, verbose=False)
        return [list(ids) for ids in encoded["input_ids"]]

    def _found_around(self) -> tuple[str, list[int], list[int]]:
        """Return a text that has tokens, and the ids that the tokenizer puts before and after it.

        Raises ``ConfigError`` when no text shows them.
        """
        for text in self._probes():
            [plain] = self._encode([text], add_special_tokens=False)
            if not plain or not (self.special_ids - {self._tokenizer.unk_token_id}).isdisjoint(plain):
                continue
            [full] = self._encode([text], add_special_tokens=True)
            starts = _places(plain, full)
            if len(starts) == 1:
                return text, full[: starts[0]], full[starts[0] + len(plain) :]
        raise ConfigError(
            f"what the tokenizer ({type(self._tokenizer).__name__}) puts before and after a text cannot be told: a "
            "text made of its own vocabulary has no tokens, or other ones between special tokens; use another tokenizer"
        )

    def _probes(self) -> Iterator[str]:
        """Yield texts to try: a usual one, then entries of the vocabulary, for alphabets such as that of DNA."""
        yield _PROBE
        ordinary = np.setdiff1d(np.fromiter(self._tokenizer.get_vocab().values(), np.int64), list(self.special_ids))
        spread = (
            ordinary[np.unique(np.linspace(0, len(ordinary) - 1, _MOST_PROBES).astype(int))] if len(ordinary) else []
        )
        for token_id in map(int, spread):
            for text in (self._tokenizer.decode([token_id]), self._tokenizer.convert_ids_to_tokens(token_id)):
                if text and text.strip():
                    yield text


def _places(part: list[int], whole: list[int]) -> list[int]:
    """Return the indices at which ``part`` stands in ``whole``."""
    return [start for start in range(len(whole) - len(part) + 1) if whole[start : start + len(part)] == part]


def _backend(tokenizer: Any) -> Any | None:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return backend if isinstance(backend, tokenizers.Tokenizer) else None


def _describe(tokenizer: Any) -> dict[str, Any]:
    """Return everything that decides which ids a text gets, as JSON values."""
    backend = _backend(tokenizer)
    if backend is None:
        logger.warning(
            "%s has no tokenizers backend: it is identified by its vocabulary only, not by its rules",
            type(tokenizer).__name__,
        )
    full = {} if backend is None else json.loads(backend.to_str())
    return {
        "vocab": dict(tokenizer.get_vocab()),
        "rules": _rules(full) if full else {"class": type(tokenizer).__name__},
        "added_tokens": sorted((_added_token(token) for token in full.get("added_tokens", [])), key=lambda t: t["id"]),
    }


def _rules(full: Mapping[str, Any]) -> dict[str, Any]:
    model = dict(full["model"])
    # A list also has the scores of a Unigram model; a mapping is in "vocab" already.
    if isinstance(model.get("vocab"), dict):
        del model["vocab"]
    # Merges are written "a b" by old versions of tokenizers and ["a", "b"] by new ones.
    if "merges" in model:
        model["merges"] = [m.split(" ") if isinstance(m, str) else list(m) for m in model["merges"]]
    return {"model": model, "normalizer": full.get("normalizer"), "pre_tokenizer": full.get("pre_tokenizer")}


def _added_token(token: Mapping[str, Any]) -> dict[str, Any]:
    # "special" only decides what decoding skips, and loading a tokenizer may set it.
    return {name: value for name, value in token.items() if name != "special"}


def _vocabulary_differences(a: Mapping[str, int], b: Mapping[str, int]) -> list[str]:
    found = []
    num_a, num_b = max(a.values(), default=-1) + 1, max(b.values(), default=-1) + 1
    if num_a != num_b:
        found.append(f"vocabulary size {num_a} against {num_b}")
    by_id_a, by_id_b = ({number: token for token, number in vocab.items()} for vocab in (a, b))
    for number in range(min(num_a, num_b)):
        if by_id_a.get(number) != by_id_b.get(number):
            found.append(f"id {number} is {by_id_a.get(number)!r} against {by_id_b.get(number)!r}")
            break  # one example shows the difference
    return found


@contextlib.contextmanager
def without_panics() -> Iterator[None]:
    """Raise ``ValueError`` for a panic of the library tokenizers: it is no ``Exception``, and passes by all handlers.

    A tokenizer.json with a normaliser that cannot be parsed suffices.
    """
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # a class that no module has
            raise
        raise ValueError(f"the library tokenizers cannot use it: {shortened(error)}") from None


def check_decoder(tokenizer: Any, described: str) -> None:
    """Raise ``CacheError`` for a tokenizer of a cache whose decoder makes texts enormous, of which a process would die.

    A few replacements of a character by a thousand, one after another, suffice. The decoders of real tokenizers replace
    a character by another one.
    """
    backend = tokenizer if isinstance(tokenizer, tokenizers.Tokenizer) else _backend(tokenizer)
    decoder = None if backend is None else backend.decoder
    if decoder is None:
        return
    growth = _growth(json.loads(decoder.__getstate__()))
    if growth > _MOST_GROWTH:
        raise CacheError(
            f"{described} has a decoder that makes texts up to {growth:,.0f} times as long (at most {_MOST_GROWTH} is "
            "allowed); use a cache of another teacher"
        )


def _growth(decoder: Mapping[str, Any]) -> float:
    """Return how many times as long a decoder may make a text."""
    if decoder.get("type") == "Sequence":
        return math.prod(map(_growth, decoder.get("decoders", [])))
    if decoder.get("type") != "Replace":
        return 1.0
    content, pattern = len(decoder.get("content", "")), decoder.get("pattern", {}).get("String", "")
    # A regular expression may match between any two characters.
    return max(1.0, content / len(pattern)) if pattern else 1.0 + content


def tokenizer_files(tokenizer: Any) -> dict[str, bytes]:
    """Return the files that ``save_pretrained`` writes, by name: enough to load the tokenizer anywhere."""
    with tempfile.TemporaryDirectory(prefix="kdcache-") as directory:
        tokenizer.save_pretrained(directory)
        return {path.name: path.read_bytes() for path in sorted(Path(directory).iterdir()) if path.is_file()}
