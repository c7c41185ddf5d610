"""Train students from a cache (see ``kdcache.train.run``)."""

from kdcache.train.config import TrainConfig
from kdcache.train.module import Distiller
from kdcache.train.prepare import leave_processes
from kdcache.train.preview import preview_training
from kdcache.train.report import TrainingReport
from kdcache.train.run import TrainResult, train_student

__all__ = [
    "Distiller",
    "TrainConfig",
    "TrainResult",
    "TrainingReport",
    "leave_processes",
    "preview_training",
    "train_student",
]
