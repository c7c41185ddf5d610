"""Loops over cases inside one test, for tests so quick that an id for every case costs more than the case."""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

Test = Callable[..., None]


def loop(names: str | Sequence[str], values: Iterable[Any], ids: Iterable[str] | Callable[[Any], Any] | None = None):
    """Call a test with every value, each in a subtest of its own: all cases that fail are reported, by name.

    The arguments are those of `pytest.mark.parametrize`, loops over several names are stacked in the same way, and
    the test function stays as it is. Fixtures are made once, for all cases together: a test that changes what a
    fixture gives must be parametrised instead.
    """
    argnames = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)
    rows = [(value,) if len(argnames) == 1 else tuple(value) for value in values]
    assert rows, f"no cases for {', '.join(argnames)}"
    assert all(len(row) == len(argnames) for row in rows), f"not one value for each of {', '.join(argnames)}"
    labels = [", ".join(_label(value) for value in row) for row in rows]
    if callable(ids):
        labels = [", ".join(str(ids(value)) for value in row) for row in rows]
    elif ids is not None:
        labels = list(ids)
    cases = [(label, dict(zip(argnames, row, strict=True))) for label, row in zip(labels, rows, strict=True)]

    def decorate(test: Test) -> Test:
        body = getattr(test, "body", test)
        loops = [cases, *getattr(test, "loops", [])]

        @functools.wraps(body)
        def looped(subtests: Any, **fixtures: Any) -> None:
            for combination in itertools.product(*loops):
                with subtests.test("; ".join(label for label, _ in combination)):
                    body(**{name: value for _, case in combination for name, value in case.items()}, **fixtures)

        given = {name for loop in loops for name in loop[0][1]}
        parameters = inspect.signature(body).parameters
        assert given <= set(parameters), f"{body.__name__} has no argument {', '.join(given - set(parameters))}"
        fixtures = [parameter for name, parameter in parameters.items() if name not in given]
        keyword = inspect.Parameter.KEYWORD_ONLY
        subtests = inspect.Parameter("subtests", keyword)
        looped.__signature__ = inspect.Signature([subtests, *(one.replace(kind=keyword) for one in fixtures)])
        looped.body, looped.loops = body, loops
        return looped

    return decorate


def _label(value: Any) -> str:
    return getattr(value, "__name__", None) or repr(value)
