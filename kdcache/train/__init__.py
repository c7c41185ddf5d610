"""Train students from a cache (see ``kdcache.train.run``)."""

from kdcache.train.config import TrainConfig
from kdcache.train.module import Distiller
from kdcache.train.report import plan_training
from kdcache.train.run import TrainResult, train_student

__all__ = ["Distiller", "TrainConfig", "TrainResult", "plan_training", "train_student"]
