"""Train many students from one cache and compare them (see ``kdcache.sweep.run``)."""

from kdcache.sweep.config import SweepConfig, read_sweep
from kdcache.sweep.plan import SweepPlan, plan_sweep
from kdcache.sweep.run import SweepResult, sweep

__all__ = ["SweepConfig", "SweepPlan", "SweepResult", "plan_sweep", "read_sweep", "sweep"]
