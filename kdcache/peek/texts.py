"""Decode tokens with the tokenizer of the cache (no torch, no transformers)."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from tokenizers import Tokenizer

from kdcache.cache import Cache
from kdcache.errors import CacheError, shortened
from kdcache.models.tokenizer import check_decoder, without_panics

#: Characters of a text that is shown; a token may be as long as the file allows.
_MOST_CHARACTERS = 1 << 26


class Texts:
    """Decodes token ids; raises ``CacheError`` if the tokenizer of the cache cannot be read."""

    def __init__(self, cache: Cache) -> None:
        text = cache.tokenizer_json()
        try:
            with without_panics():
                self._tokenizer: Any = Tokenizer.from_str(text)
        except Exception as error:  # the library raises plain Exception
            raise CacheError(f"the tokenizer.json of {cache.folder} cannot be read: {shortened(error)}") from None
        self._described = f"the tokenizer of {cache.folder}"
        check_decoder(self._tokenizer, self._described)

    def fed(self, ids: list[int]) -> str:
        """Return the text of a model input, special tokens included."""
        size = sum(len(self._tokenizer.id_to_token(number) or "") for number in ids)
        if size > _MOST_CHARACTERS:
            raise CacheError(
                f"{self._described} makes {size:,} characters of {len(ids):,} tokens (at most {_MOST_CHARACTERS:,} are "
                "shown); use a cache of another teacher"
            )
        try:
            with without_panics():
                text: str = self._tokenizer.decode(ids, skip_special_tokens=False)
        except Exception as error:  # the library raises plain Exception
            raise CacheError(f"{self._described} cannot decode {len(ids):,} tokens: {shortened(error)}") from None
        return text

    def plain(self, ids: list[int]) -> str:
        """Return a text without the special tokens around it; those inside it, such as unknown words, are kept."""
        start, stop = 0, len(ids)
        while start < stop and ids[start] in self._specials:
            start += 1
        while stop > start and ids[stop - 1] in self._specials:
            stop -= 1
        return self.fed(ids[start:stop])

    def token(self, token_id: int) -> str:
        """Return a token as text; in its raw form if it is not text by itself (a piece of a character)."""
        text = self.fed([token_id])
        if text and "\ufffd" not in text:
            return text
        return self._tokenizer.id_to_token(token_id) or f"<{token_id}>"

    @cached_property
    def _specials(self) -> set[int]:
        # The token of unknown words replaces a part of the text.
        unknown = getattr(self._tokenizer.model, "unk_token", None)
        added = self._tokenizer.get_added_tokens_decoder().items()
        return {number for number, token in added if token.special and token.content not in (unknown, "<unk>")}
