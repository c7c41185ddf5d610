"""Losses between a student and its teacher's cached rows, and the objective that sums them.

`Objective` trains, `score_positions` evaluates; both walk over the positions in chunks (`chunked`), show each chunk to
the losses as a `ChunkView`, and know the losses from one table, `LOSSES`. Terms (`Term`, table `TERMS`) compare other
outputs of the student with the teacher's, and may own parameters. `TeacherContext` says what kind of cache the
rows come from, and `allowed` which losses make sense with it. Nothing here reads a cache.
"""

from kdcache.losses.base import Loss, Part, allowed
from kdcache.losses.context import TeacherContext
from kdcache.losses.divergences import LOSSES, CrossEntropy
from kdcache.losses.forward_kl import ForwardKL
from kdcache.losses.objective import Objective, ObjectiveConfig, ObjectiveOutput
from kdcache.losses.schedules import SCHEDULES
from kdcache.losses.scores import PositionScores, per_position_values, score_positions
from kdcache.losses.selection import MEASURES, Select
from kdcache.losses.teacher_rows import TeacherRows
from kdcache.losses.term_table import TERMS
from kdcache.losses.terms import LayerStates, Needs, Outputs, Term, TermModule
from kdcache.losses.view import ChunkView

__all__ = [
    "LOSSES",
    "MEASURES",
    "SCHEDULES",
    "TERMS",
    "ChunkView",
    "CrossEntropy",
    "ForwardKL",
    "LayerStates",
    "Loss",
    "Needs",
    "Objective",
    "ObjectiveConfig",
    "ObjectiveOutput",
    "Outputs",
    "Part",
    "PositionScores",
    "Select",
    "TeacherContext",
    "TeacherRows",
    "Term",
    "TermModule",
    "allowed",
    "per_position_values",
    "score_positions",
]
