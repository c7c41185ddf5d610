"""The table of teacher backends; other packages add rows by entry points in the group ``kdcache.teachers``."""

from __future__ import annotations

from kdcache.plugins import Table
from kdcache.teachers.base import Backend

#: By the name that ``teacher.backend`` and ``TeacherRecord.backend`` have.
BACKENDS: Table[Backend] = Table(
    "teacher backend",
    "kdcache.teachers",
    {"transformers": "kdcache.teachers.transformers_backend:TransformersBackend"},
    make=lambda backend: backend(),
)
