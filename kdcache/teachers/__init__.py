"""Teachers: models that turn sequences into targets, and what is kept of their logits."""

from kdcache.teachers.huggingface import HuggingFaceTeacher, TeacherConfig, TeacherOutput, load_teacher, parse_layers
from kdcache.teachers.reduce import TargetReducer, reduce_top_k
from kdcache.teachers.samples import sample_uniforms

__all__ = [
    "HuggingFaceTeacher",
    "TargetReducer",
    "TeacherConfig",
    "TeacherOutput",
    "load_teacher",
    "parse_layers",
    "reduce_top_k",
    "sample_uniforms",
]
