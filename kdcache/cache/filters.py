"""Filters: select sequences by a condition on the columns of the per-sequence table.

A filter is an expression such as ``teacher_loss < 5 and source in ["wiki", "books"]``. Python's parser parses it, but
it is never executed: this module walks the syntax tree and rejects every node that is not listed at its end, so an
expression from an untrusted configuration can only compare. Each node is evaluated for all sequences at once, with
Arrow. Missing values follow SQL: a comparison with one is neither true nor false, and a sequence is selected only if
the whole expression is true.

Filters see whole sequences, not single positions.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterable
from functools import reduce
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from kdcache.cache.columns import as_numpy
from kdcache.errors import ConfigError, did_you_mean
from kdcache.words import count

#: Columns that a cache has only if its teacher gives the number that they are made of.
_OF_THE_TEACHER = {
    "teacher_loss": "the log-probability of the gold token",
    "teacher_entropy": "the entropy of its distribution",
    "kept_mass": "a distribution",
}

#: A text constant, or a column name in backquotes, which may contain any character.
_QUOTED = re.compile(r"""('(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")|`([^`]*)`""")
_LANGUAGE = (
    "a filter may contain column names, numbers, 'texts', comparisons, in ['a', 'b'], and, or, not, and + - * / // %"
)


class Columns(Protocol):
    """What filters need of a table: ``pyarrow.Table`` has it, and `kdcache.cache.sequence_table.SequenceTable`."""

    @property
    def num_rows(self) -> int:
        """Number of rows, N."""

    @property
    def column_names(self) -> list[str]:
        """Names of all columns."""

    @property
    def schema(self) -> Any:
        """Names and types of all columns."""

    def __getitem__(self, name: str) -> Any:
        """Return a column."""


def columns_of(where: str) -> list[str]:
    """Return the names that a filter mentions, in their order; none where it cannot be parsed."""
    try:
        return _Evaluation(pa.table({}), where).columns()
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []


def select_sequences(table: Columns, where: str | None, limit: int | None = None) -> NDArray[np.int64]:
    """Return the rows of the per-sequence ``table`` that ``where`` selects (None: all), at most ``limit``.

    Raises ``ConfigError`` for an invalid expression, an unknown column, or a filter that selects nothing.
    """
    if where is None:
        return np.arange(table.num_rows)[:limit]
    chosen = np.flatnonzero(filter_mask(table, where))
    if not len(chosen):
        seen = "; ".join(_ranges(table, where))
        raise ConfigError(
            f"filter {where!r} selects none of the {count(table.num_rows, 'sequence')}{seen and f' ({seen})'}"
        )
    return chosen[:limit]


def filter_mask(table: Columns, where: str) -> NDArray[np.bool_]:
    """Return for every row of ``table`` whether the expression ``where`` is true, [N]; raises ``ConfigError``."""
    value = _Evaluation(table, where).result()
    if not isinstance(value, pa.Scalar):
        return as_numpy(pc.fill_null(value, False))
    return np.full(table.num_rows, bool(value.as_py()))


def number_column(table: Columns, name: str, rows_N: NDArray[np.int64], setting: str) -> NDArray[np.float64]:
    """Return the values of the column ``name`` of ``table`` in the rows ``rows_N``, [N] float64.

    Raises ``ConfigError``, naming the ``setting``, for an unknown column, one without numbers, and one that has no
    value (null or NaN) in one of the rows.
    """
    if name not in table.column_names:
        raise ConfigError(f"{setting}: {_unknown_column(name, _number_names(table), 'columns of numbers')}")
    if name not in _number_names(table):
        kind, known = _kind(_plain(table[name])), ", ".join(_number_names(table))
        raise ConfigError(f"{setting}: column {name!r} holds a {kind}, not numbers; columns of numbers are {known}")
    values_N = as_numpy(_floating(_plain(table[name]))).astype(np.float64)[rows_N]
    num_missing = int(np.isnan(values_N).sum())
    if num_missing:
        quoted = name if name.isidentifier() else f"`{name}`"
        raise ConfigError(
            f"{setting}: column {name!r} has no value for {count(num_missing, 'sequence', of=len(rows_N))}; exclude "
            f"them with the filter (where) {f'{quoted} == {quoted}'!r}"
        )
    return values_N


class _Evaluation:
    """One expression over one table; values are Arrow columns, or Arrow scalars where they are constant."""

    def __init__(self, table: Columns, where: str) -> None:
        self._table, self._where = table, where
        self._quoted: dict[str, str] = {}
        self._text = _QUOTED.sub(self._name_of_quoted, where).replace("\n", " ").strip()

    def result(self) -> Any:
        """Return the value of the expression, of booleans."""
        try:
            tree = ast.parse(self._text, mode="eval").body
            value = self.value(tree)
        except SyntaxError as error:
            raise self.error(f"cannot be read ({error.msg}); {_LANGUAGE}") from None
        except (ValueError, RecursionError, MemoryError, OverflowError, pa.ArrowException) as error:
            raise self.error(f"cannot be evaluated ({str(error) or type(error).__name__})") from None
        if _kind(value) != "condition":
            raise self.error(f"is a {_kind(value)} for every sequence, not a condition; compare it with something")
        return value

    def columns(self) -> list[str]:
        """Return the columns that the expression names, in their order."""
        names = [node.id for node in ast.walk(ast.parse(self._text)) if isinstance(node, ast.Name)]
        return list(dict.fromkeys(self._quoted.get(name, name) for name in names))

    def value(self, node: ast.AST) -> Any:
        evaluate = _NODES.get(type(node))
        if evaluate is None:
            raise self.error(f"contains {self._source(node)}, which is not allowed; {_LANGUAGE}")
        return evaluate(self, node)

    def values(self, nodes: Iterable[ast.AST], kind: str) -> list[Any]:
        """Return the values of ``nodes``, which must be of one kind."""
        found = []
        for node in nodes:
            value = self.value(node)
            if _kind(value) != kind:
                raise self.error(f"uses {self._source(node)}, a {_kind(value)}, where a {kind} is expected")
            found.append(value)
        return found

    def operation(self, table: dict[type[ast.AST], Any], node: ast.AST, operator: ast.AST) -> Any:
        if type(operator) not in table:
            raise self.error(f"contains {self._source(node)}, whose operator is unsupported; {_LANGUAGE}")
        return table[type(operator)]

    def column(self, node: ast.Name) -> Any:
        name = self._quoted.get(node.id, node.id)
        if name not in self._table.column_names:
            known = self._table.column_names
            unknown = _unknown_column(name, known, "known")
            raise ConfigError(f"filter {_short(self._where)!r}: {unknown} (texts need quotes)")
        return _plain(self._table[name])

    def constant(self, node: ast.Constant) -> Any:
        if not isinstance(node.value, bool | int | float | str):
            raise self.error(f"contains {self._source(node)}, which is not allowed; {_LANGUAGE}")
        return pa.scalar(node.value)

    def logic(self, node: ast.BoolOp) -> Any:
        combine = pc.and_kleene if isinstance(node.op, ast.And) else pc.or_kleene
        return reduce(combine, self.values(node.values, "condition"))

    def unary(self, node: ast.UnaryOp) -> Any:
        kind, change = self.operation(_UNARY, node, node.op)
        return change(self.values([node.operand], kind)[0])

    def arithmetic(self, node: ast.BinOp) -> Any:
        change = self.operation(_ARITHMETIC, node, node.op)
        return change(*self.values([node.left, node.right], "number"))

    def comparison(self, node: ast.Compare) -> Any:
        operands = [node.left, *node.comparators]
        steps = zip(node.ops, pairwise(operands), strict=True)
        return reduce(pc.and_kleene, [self._compare(node, operator, *pair) for operator, pair in steps])

    def _compare(self, node: ast.Compare, operator: ast.cmpop, left: ast.AST, right: ast.AST) -> Any:
        value = self.value(left)
        if isinstance(operator, ast.In | ast.NotIn):
            inside = self._is_in(value, right)
            return inside if isinstance(operator, ast.In) else pc.invert(inside)
        compare = self.operation(_COMPARISONS, node, operator)
        return compare(value, self.values([right], _kind(value))[0])

    def _is_in(self, value: Any, node: ast.AST) -> Any:
        if not isinstance(node, ast.List | ast.Tuple):
            raise self.error(f"needs a list such as ['a', 'b'] after in, found {self._source(node)}")
        members = [item.as_py() for item in self.values(node.elts, _kind(value)) if isinstance(item, pa.Scalar)]
        if len(members) != len(node.elts):
            raise self.error(f"needs constants in {self._source(node)}")
        members_array = _plain(pa.array(members, None if members else value.type))
        if value.type != members_array.type:  # of numbers: whole and other ones
            value, members_array = _floating(value), _floating(members_array)
        inside = pc.is_in(value, value_set=members_array)
        return pc.if_else(pc.is_valid(value), inside, pa.scalar(None, pa.bool_()))

    def error(self, words: str) -> ConfigError:
        return ConfigError(f"filter {_short(self._where)!r} {words}")

    def _source(self, node: ast.AST) -> str:
        text = ast.get_source_segment(self._text, node) or type(node).__name__
        for name, quoted in self._quoted.items():
            text = text.replace(name, f"`{quoted}`")
        return _short(text)

    def _name_of_quoted(self, match: re.Match[str]) -> str:
        if match[1] is not None:
            return match[1]
        name = f"__quoted_{len(self._quoted)}__"
        self._quoted[name] = match[2]
        return name


def _unknown_column(name: str, known: list[str], title: str) -> str:
    if name in _OF_THE_TEACHER:
        what = _OF_THE_TEACHER[name]
        return f"the cache has no column {name!r}, since its teacher does not give {what}; {title}: {', '.join(known)}"
    hint = did_you_mean(name, known)
    guess = f"{hint} " if hint.startswith("did you mean") else ""
    return f"unknown column {name!r}; {guess}{title}: {', '.join(known)}"


def _short(text: str) -> str:
    return text if len(text) <= 100 else text[:97] + "..."


def _plain(values: Any) -> Any:
    """Return values as the widest type of their kind, so that only kinds have to agree."""
    if pa.types.is_dictionary(values.type):
        values = pc.cast(values, values.type.value_type)
    if pa.types.is_integer(values.type) and values.type != pa.uint64():
        return pc.cast(values, pa.int64())
    if pa.types.is_floating(values.type):
        return pc.cast(values, pa.float64())
    return pc.cast(values, pa.string()) if pa.types.is_large_string(values.type) else values


def _kind(value: Any) -> str:
    """Return the kind of the values, in a word; only values of the same kind can be compared."""
    if pa.types.is_boolean(value.type):
        return "condition"
    if pa.types.is_integer(value.type) or pa.types.is_floating(value.type):
        return "number"
    return "text" if pa.types.is_string(value.type) else str(value.type)


def _number_names(table: Columns) -> list[str]:
    # By their types: this must not read all columns.
    return [field.name for field in table.schema if _kind(_plain(pa.nulls(0, field.type))) == "number"]


def _ranges(table: Columns, where: str) -> list[str]:
    """Return the range of each numeric column that a filter names, in words."""
    named = {name: _plain(table[name]) for name in _Evaluation(table, where).columns()}
    bounds = {name: pc.min_max(column).as_py() for name, column in named.items() if _kind(column) == "number"}
    known = {name: found for name, found in bounds.items() if found["min"] is not None}
    return [f"{name} is {found['min']:.5g} to {found['max']:.5g}" for name, found in known.items()]


def _floating(values: Any) -> Any:
    return pc.cast(values, pa.float64(), safe=False)  # whole numbers beyond 2^53 are rounded


def _divide(left: Any, right: Any) -> Any:
    """Return true quotients, infinite or not a number where the divisor is 0."""
    return pc.divide(_floating(left), _floating(right))


def _floor_divide(left: Any, right: Any) -> Any:
    return pc.floor(_divide(left, right))


def _modulo(left: Any, right: Any) -> Any:
    return pc.subtract(left, pc.multiply(_floor_divide(left, right), right))


_COMPARISONS: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Eq: pc.equal,
    ast.NotEq: pc.not_equal,
    ast.Lt: pc.less,
    ast.LtE: pc.less_equal,
    ast.Gt: pc.greater,
    ast.GtE: pc.greater_equal,
}
_ARITHMETIC: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Add: pc.add_checked,
    ast.Sub: pc.subtract_checked,
    ast.Mult: pc.multiply_checked,
    ast.Div: _divide,
    ast.FloorDiv: _floor_divide,
    ast.Mod: _modulo,
}
_UNARY: dict[type[ast.AST], tuple[str, Callable[..., Any]]] = {
    ast.Not: ("condition", pc.invert),
    ast.USub: ("number", pc.negate_checked),
    ast.UAdd: ("number", _plain),
}

#: Every kind of node that a filter may contain, and its evaluation.
_NODES: dict[type[ast.AST], Callable[[_Evaluation, Any], Any]] = {
    ast.BoolOp: _Evaluation.logic,
    ast.UnaryOp: _Evaluation.unary,
    ast.BinOp: _Evaluation.arithmetic,
    ast.Compare: _Evaluation.comparison,
    ast.Name: _Evaluation.column,
    ast.Constant: _Evaluation.constant,
}
