"""Tasks: what a position is, what the models are fed, and which row belongs to which label."""

from kdcache.tasks import causal_lm

#: Every task by its name on the command line.
TASKS = {causal_lm.NAME: causal_lm}
