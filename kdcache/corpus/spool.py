"""The tokens of the whole corpus in one temporary memory-mapped file, so that texts are tokenised once.

Planning needs every document's length before the first sequence is known, and dumping needs the tokens afterwards.
The file has no name where the system allows it (POSIX), so that nothing is left behind even by a killed process.
It takes 4 bytes per token in the directory for temporary files, which ``TMPDIR`` moves.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kdcache.errors import CorpusError


class TokenSpool:
    """Token ids that are appended document by document, then read as one uint32 array; a context manager.

    Raises ``CorpusError`` when the directory for temporary files is full or cannot be written.
    """

    def __init__(self) -> None:
        try:
            self._file = tempfile.TemporaryFile(prefix="kdcache-tokens-")  # noqa: SIM115 - closed by __exit__
        except OSError as error:
            raise _cannot_write(error) from None
        self.num_tokens = 0

    def __enter__(self) -> TokenSpool:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()  # the memory map has a handle of its own

    def append(self, documents: Sequence[NDArray[np.uint32]]) -> None:
        """Append the tokens of some documents."""
        try:
            for tokens in documents:
                self._file.write(tokens.tobytes())
        except OSError as error:
            raise _cannot_write(error) from None
        self.num_tokens += sum(len(tokens) for tokens in documents)

    def finish(self) -> NDArray[np.uint32]:
        """Return all tokens, memory-mapped; the file goes away with the array, not with the spool."""
        if self.num_tokens == 0:
            return np.zeros(0, np.uint32)
        try:
            self._file.flush()
        except OSError as error:
            raise _cannot_write(error) from None
        return np.memmap(self._file, np.uint32, "r", shape=(self.num_tokens,))


def _cannot_write(error: OSError) -> CorpusError:
    return CorpusError(
        f"cannot write the temporary file of tokens in {tempfile.gettempdir()}: {error.strerror or error}; "
        f"it needs 4 bytes per token of the corpus, set TMPDIR to a directory with more room"
    )
