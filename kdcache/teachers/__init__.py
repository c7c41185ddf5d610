"""Teachers: backends that load them, what they can give, and what is kept of their logits.

Each name is imported when it is first used, because most of them need torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kdcache.teachers.backends import BACKENDS
    from kdcache.teachers.base import Answer, Backend, BackendConfig, Capabilities, Request, Teacher, parse_layers
    from kdcache.teachers.config import TeacherConfig
    from kdcache.teachers.huggingface import HuggingFaceTeacher, load_teacher
    from kdcache.teachers.logits import LogitsTeacher, TeacherOutput
    from kdcache.teachers.reduce import TargetReducer, reduce_top_k
    from kdcache.teachers.samples import sample_uniforms

_HOMES = {
    "BACKENDS": "backends",
    "Answer": "base",
    "Backend": "base",
    "BackendConfig": "base",
    "Capabilities": "base",
    "HuggingFaceTeacher": "huggingface",
    "LogitsTeacher": "logits",
    "Request": "base",
    "TargetReducer": "reduce",
    "Teacher": "base",
    "TeacherConfig": "config",
    "TeacherOutput": "logits",
    "load_teacher": "huggingface",
    "parse_layers": "base",
    "reduce_top_k": "reduce",
    "sample_uniforms": "samples",
}

__all__ = [
    "BACKENDS",
    "Answer",
    "Backend",
    "BackendConfig",
    "Capabilities",
    "HuggingFaceTeacher",
    "LogitsTeacher",
    "Request",
    "TargetReducer",
    "Teacher",
    "TeacherConfig",
    "TeacherOutput",
    "load_teacher",
    "parse_layers",
    "reduce_top_k",
    "sample_uniforms",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
