"""Codecs: meaning to numbers and back (arrays in, arrays out; never torch, never files)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from kdcache.codecs.ids import id_dtype
from kdcache.codecs.targets import TargetsCodec
from kdcache.codecs.topk import TOPK_CODECS, TopKCodec
from kdcache.codecs.vectors import VECTOR_CODECS, VectorCodec
from kdcache.config import Config, build
from kdcache.plugins import Table
from kdcache.schema import TargetsRecord

__all__ = [
    "TOPK_CODECS",
    "VECTOR_CODECS",
    "TargetsCodec",
    "TopKCodec",
    "VectorCodec",
    "id_dtype",
    "targets_codec",
    "topk_codec",
    "vector_codec",
]

C = TypeVar("C", bound=Config)


def topk_codec(parameters: Mapping[str, Any]) -> TopKCodec:
    """Build the codec of kept ids that ``parameters`` (a name and its settings) describe."""
    return _from_table(TOPK_CODECS, parameters)


def targets_codec(parameters: Mapping[str, Any], record: TargetsRecord, vocab_size: int) -> TargetsCodec:
    """Build the codec of targets of the kind ``record`` whose kept ids are stored as ``parameters`` say."""
    return TargetsCodec(topk_codec(parameters), record, vocab_size)


def vector_codec(parameters: Mapping[str, Any]) -> VectorCodec:
    """Build the codec of hidden states that ``parameters`` describe."""
    return _from_table(VECTOR_CODECS, parameters)


def _from_table(table: Table[type[C]], parameters: Mapping[str, Any]) -> C:
    name = str(parameters.get("name"))
    return build(table[name], parameters, source=f"codec {name}")
