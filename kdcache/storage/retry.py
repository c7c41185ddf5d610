"""The one retry policy for remote stores: which errors may pass, how often an operation is tried, and the pauses.

Every operation of a `Folder` on a remote store goes through `retrying`. An error is *final* when another attempt
cannot change it: a missing object, no permission, a request that the store rejects or does not implement, a full local
disk. Everything else (connections cut or refused, timeouts, "slow down", 5xx answers, bytes that arrive damaged) is
tried again after growing pauses. Pauses are random by up to a half either way, so that many processes that were turned
away together do not return together.

Clients wrap errors: fsspec's HTTP client turns a 503 into ``FileNotFoundError``, s3fs turns it into ``OSError``. So the
decision looks at the whole chain of causes, for an HTTP status first.
"""

from __future__ import annotations

import errno
import random
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from kdcache.errors import KdcacheError

T = TypeVar("T")

#: Mean seconds before the second and each further attempt.
PAUSES_S = (0.5, 1.0, 2.0, 4.0)

#: 4xx answers that may pass: request timeout, conflict with a concurrent write, too early, too many requests.
_PASSING_STATUSES = {408, 409, 425, 429}
#: Answers of servers that will not change their mind: not implemented, HTTP version not supported.
_FINAL_STATUSES = {501, 505}
_FINAL_ERRORS = (
    KdcacheError,
    FileNotFoundError,
    FileExistsError,
    IsADirectoryError,
    NotADirectoryError,
    PermissionError,
    NotImplementedError,
    AttributeError,
    TypeError,
    ValueError,
)
#: Of the local disk: full, its quota used up, read-only.
_FINAL_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}
#: Of clients that find no credentials; by name, because the clients are optional.
_FINAL_NAMES = {"NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "TokenRetrievalError"}


class WrongBytesError(Exception):
    """Bytes arrived that are not the recorded ones; fetching them again may help."""


class RetriesExhaustedError(Exception):
    """Every attempt failed; ``__cause__`` is the error of the last one."""

    def __init__(self, attempts: int, last: Exception) -> None:
        super().__init__(f"{words_of(last)} (in {attempts} attempts)")
        self.attempts = attempts
        self.last = last


def retrying(action: Callable[[], T]) -> T:
    """Return what ``action`` returns, trying again after errors that may pass.

    Final errors are raised as they are. Raises ``RetriesExhaustedError`` after the last attempt. ``action`` must be
    safe to repeat: an attempt that failed may have had its effect.
    """
    for pause_s in PAUSES_S:
        try:
            return action()
        except Exception as error:
            if is_final(error):
                raise
        time.sleep(pause_s * random.uniform(0.5, 1.5))
    try:
        return action()
    except Exception as error:
        if is_final(error):
            raise
        raise RetriesExhaustedError(len(PAUSES_S) + 1, error) from error


def is_final(error: BaseException) -> bool:
    """Return whether another attempt cannot change ``error``."""
    chain = list(causes(error))
    statuses = [status for status in map(status_of, chain) if status is not None]
    if not any(isinstance(item, (ConnectionError, TimeoutError)) for item in chain) and statuses:
        return statuses[-1] in _FINAL_STATUSES or (400 <= statuses[-1] < 500 and statuses[-1] not in _PASSING_STATUSES)
    # A client that reports a broken connection as a missing file is not to be believed.
    if any(_is_of_the_network(item) for item in chain):
        return False
    return any(isinstance(item, _FINAL_ERRORS) or _is_final_here(item) for item in chain)


def _is_of_the_network(error: BaseException) -> bool:
    if isinstance(error, _FINAL_ERRORS) or _is_final_here(error):
        return False
    return isinstance(error, OSError) or type(error).__module__.startswith("aiohttp")


def _is_final_here(error: BaseException) -> bool:
    """Return whether the local disk or the credentials of this machine are the reason."""
    is_disk = isinstance(error, OSError) and error.errno in _FINAL_ERRNOS
    return is_disk or lacks_credentials(error)


def lacks_credentials(error: BaseException) -> bool:
    """Return whether a client found no credentials, or only a part of them."""
    return type(error).__name__ in _FINAL_NAMES


def words_of(error: BaseException) -> str:
    """Return the message of ``error``, its class where it has none."""
    return str(error) or type(error).__name__


def causes(error: BaseException) -> Iterator[BaseException]:
    """Yield ``error``, its cause, the cause of that, and so on."""
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__


def status_of(error: BaseException) -> int | None:
    """Return the HTTP status of the answer that ``error`` reports: of aiohttp's, botocore's or gcsfs's errors."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    elif type(error).__module__.startswith("gcsfs"):  # aiohttp has codes too, of answers that arrived broken
        found = getattr(error, "code", None)
    else:
        found = getattr(error, "status", None)
    return found if isinstance(found, int) and 100 <= found < 600 else None
