"""Students: the settings that name one, named sizes, and loading a model that fits a cache.

Settings and sizes need neither torch nor transformers; `Student` and `load_student` are imported when they are used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kdcache.students.config import StudentConfig
from kdcache.students.sizes import SIZES

if TYPE_CHECKING:
    from kdcache.students.load import Student, load_student

__all__ = ["SIZES", "Student", "StudentConfig", "load_student"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from kdcache.students import load

    return getattr(load, name)
