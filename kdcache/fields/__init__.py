"""Fields: what a cache stores, one kind of field per file.

A field kind knows everything about one stored thing: its arrays, how rows are staged, encoded, opened, decoded and
checked, and what training and Arrow tables get of it. Writer, reader, ``verify``, Arrow export, collation and
``transcode`` are loops over fields. Kinds are found by name in ``FIELD_KINDS``; another package adds one by an entry
point in the group ``kdcache.fields``.
"""

from __future__ import annotations

from collections.abc import Iterable

from kdcache.errors import ConfigError
from kdcache.fields.base import FieldKind
from kdcache.fields.targets import TARGETS_FIELD, TargetsField, targets_field
from kdcache.fields.tokens import (
    CLASS_LABELS,
    NUMBER_LABELS,
    SEGMENT_IDS,
    TOKEN_INDEX,
    TOKENS_FIELD,
    TokenRows,
    TokensField,
    optional_arrays,
    tokens_field,
)
from kdcache.fields.vectors import VectorsField, vectors_field
from kdcache.plugins import Table
from kdcache.schema import FieldRecord, Plan, SequenceBatch

__all__ = [
    "CLASS_LABELS",
    "FIELD_KINDS",
    "NUMBER_LABELS",
    "SEGMENT_IDS",
    "TARGETS_FIELD",
    "TOKENS_FIELD",
    "TOKEN_INDEX",
    "FieldKind",
    "TargetsField",
    "TokenRows",
    "TokensField",
    "VectorsField",
    "field_of",
    "kind_of",
    "known_fields",
    "optional_arrays",
    "targets_field",
    "tokens_field",
    "vectors_field",
]

#: Every kind of field by the name that `FieldRecord.kind` has.
FIELD_KINDS: Table[type[FieldKind]] = Table(
    "field kind",
    "kdcache.fields",
    {"tokens": TokensField, "targets": TargetsField, "vectors": VectorsField},
)


def field_of(record: FieldRecord, plan: Plan) -> FieldKind:
    """Return the field that ``record`` describes in ``plan``.

    Raises ``ConfigError`` for an unknown kind or codec, and for a plugin that cannot be imported.
    """
    return FIELD_KINDS[record.kind](record, plan)


def known_fields(plan: Plan, names: Iterable[str] | None = None) -> dict[str, FieldKind]:
    """Return the fields of ``plan`` (or those called ``names``) whose kind is installed here, by name.

    A cache may have fields of a plugin that is missing or broken; everything else of it can still be read. Raises
    ``ConfigError`` for an unknown codec.
    """
    wanted = [plan.field(name) for name in names] if names is not None else plan.fields
    return {record.name: FIELD_KINDS[record.kind](record, plan) for record in wanted if _is_installed(record.kind)}


def _is_installed(kind: str) -> bool:
    if kind in FIELD_KINDS.own:
        return True
    try:
        return bool(FIELD_KINDS[kind])
    except ConfigError:
        return False


def kind_of(name: str, batch: SequenceBatch) -> FieldKind | type[FieldKind]:
    """Return the field that decoded ``name`` of ``batch``; the default class for batches that were made by hand."""
    default = FIELD_KINDS["targets" if name == TARGETS_FIELD else "vectors"]
    found: FieldKind | type[FieldKind] = batch.kinds.get(name, default)
    return found
