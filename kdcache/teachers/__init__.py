"""Teachers: models that turn sequences into targets, and what is kept of their logits."""

from kdcache.teachers.draws import draw_uniforms
from kdcache.teachers.huggingface import HuggingFaceTeacher, TeacherConfig, TeacherOutput, load_teacher, parse_layers
from kdcache.teachers.keep import TargetKeeper, keep_top_k

__all__ = [
    "HuggingFaceTeacher",
    "TargetKeeper",
    "TeacherConfig",
    "TeacherOutput",
    "draw_uniforms",
    "keep_top_k",
    "load_teacher",
    "parse_layers",
]
