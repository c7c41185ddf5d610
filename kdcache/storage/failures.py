"""What a failed operation on a remote store means, in words, and what to do about it.

Clients say little: S3's answer to a HEAD has no text, so a wrong key arrives as "Forbidden" and a wrong bucket as "Not
Found". The caller of `explained` names what was to be read or written.
"""

from __future__ import annotations

from kdcache.errors import shortened
from kdcache.storage.retry import RetriesExhaustedError, causes, lacks_credentials, status_of, words_of

_DENIED = {401, 403, 407}
_READ_ONLY = {405, 501}


def explained(error: BaseException) -> str:
    """Return the reason of ``error``, an error of a remote store, and what to do."""
    last = error.last if isinstance(error, RetriesExhaustedError) else error
    words = _words_of(error)
    if is_missing_bucket(last):
        return "the bucket does not exist; check its name, the endpoint (AWS_ENDPOINT_URL) and the account"
    denial = _denial_in(last)
    if denial is not None:
        return (
            f"access denied ({_words_of(denial)}); check the credentials (environment, ~/.aws) and what they may do "
            "here. Without the right to list a bucket, S3 also answers so for what does not exist"
        )
    if any(status_of(cause) in _READ_ONLY for cause in causes(last)):
        return f"the server does not support it ({words}); a store that is only read, such as http, is no target"
    if isinstance(error, RetriesExhaustedError):
        return f"{words}; check the address and the network, and run the same command again"
    return words


def is_missing_bucket(error: BaseException) -> bool:
    """Return whether the bucket (the container of all objects) is missing, and not only an object."""
    return any("bucket does not exist" in str(cause).lower() for cause in causes(error))


def is_denied(error: BaseException) -> bool:
    """Return whether the store refuses these credentials, or none were found."""
    return _denial_in(error) is not None


def _denial_in(error: BaseException) -> BaseException | None:
    """Return the first of the causes of ``error`` that says so."""
    for cause in causes(error):
        if isinstance(cause, PermissionError) or status_of(cause) in _DENIED or lacks_credentials(cause):
            return cause
    return None


def _words_of(error: BaseException) -> str:
    return shortened(" ".join(words_of(error).split()), 300)
