"""The configuration of the backend ``transformers``."""

from __future__ import annotations

from typing import Literal

from kdcache.teachers.base import BackendConfig


class TeacherConfig(BackendConfig):
    """Which Hugging Face model is the teacher, and how it runs."""

    backend: Literal["transformers"] = "transformers"
    model: str
    """Hub id, local directory, or a .gguf file."""
    dtype: str = "auto"
    """``auto``: the checkpoint's own (GGUF: float32 on a CPU, bfloat16 elsewhere)."""
    device: str = "auto"
    revision: str | None = None
