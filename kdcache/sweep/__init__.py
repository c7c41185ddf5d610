"""Train many students from one cache and compare them (see ``kdcache.sweep.run``)."""

from kdcache.sweep.config import SweepConfig, read_sweep
from kdcache.sweep.plan import SweepPlan, preview_sweep
from kdcache.sweep.run import SweepResult, sweep_students

__all__ = ["SweepConfig", "SweepPlan", "SweepResult", "preview_sweep", "read_sweep", "sweep_students"]
