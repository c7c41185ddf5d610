"""Measure whether the order of the texts, or a falling temperature, makes a better student in the same number of steps.

All rows share the cache, the student and the number of steps. The plain order is shuffled. The others sample by the
teacher's loss: easy texts first or, as a control, hard texts first. The temperature of the forward KL is 1, or falls to
1. The last row leaves out the sequences with the highest teacher loss and repeats the others more often.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from benchmarks import study
from kdcache.cache import open_cache

#: Share of the sequences that the filter drops, by teacher loss.
DROPPED = 0.2
_EASY_FIRST = {"by": "teacher_loss", "pacing": "root", "start": 0.2, "full_at": 0.5}


def _objective(temperature: Any = 1.0) -> dict[str, Any]:
    return {"forward_kl": {"weight": 1.0, "temperature": temperature}, "cross_entropy": {"weight": 0.0}}


def _falling(start: float) -> dict[str, Any]:
    return _objective({"schedule": "cosine", "start": start, "end": 1.0})


PLAIN = "shuffled"
#: Variant -> settings; where is a share of the sequences that is left out, hardest first.
VARIANTS: dict[str, dict[str, Any]] = {
    PLAIN: {},
    "easy to hard": {"curriculum": _EASY_FIRST},
    "easy to hard, strictly sorted": {"curriculum": {"by": "teacher_loss", "pacing": "sorted"}},
    "hard to easy": {"curriculum": {**_EASY_FIRST, "order": "hard-to-easy"}},
    "short to long": {"curriculum": {**_EASY_FIRST, "by": "num_positions"}},
    "temperature 2": {"objective": _objective(2.0)},
    "temperature 2 to 1": {"objective": _falling(2.0)},
    "temperature 4": {"objective": _objective(4.0)},
    "temperature 4 to 1": {"objective": _falling(4.0)},
    "progressive (easy to hard, temperature 2 to 1)": {"curriculum": _EASY_FIRST, "objective": _falling(2.0)},
    "progressive (easy to hard, temperature 4 to 1)": {"curriculum": _EASY_FIRST, "objective": _falling(4.0)},
    f"without the hardest {DROPPED:.0%}": {"where": DROPPED},
}

_PAGE = """# Curricula, temperature schedules and filters

Written by `python -m benchmarks.curricula TRAIN HELD_OUT --work DIR --docs docs` with the settings below; do not edit
it by hand.

{facts}

{table}

- *loss*, *KL* and *ECE* on the held-out texts (KL over the whole vocabulary where that cache is of the kind hidden).
  Means over the seeds with the half width of their 95 % interval (Student's t). *loss above shuffled* and *KL above
  shuffled*: the same for the paired differences from the shuffled order, same seed and start; below 0 is better.
- All students make the same number of steps on forward KL alone, at temperature 1 unless the row says otherwise.
- *easy to hard* begins with the fifth of the sequences that the teacher finds easiest (mean loss per token) and has all
  of them at half of the steps, at a falling rate (`pacing: root`). In one epoch every row but the last samples every
  sequence once, so that only the order differs. *strictly sorted* leaves nothing to the seed: for a student that was
  trained before, its runs are one and the same.
- *without the hardest*: a filter on the teacher's loss; the rest is drawn more often, for the same steps.
- *tokens/s* of training, one thread each, two students side by side on a shared machine.
"""


def main() -> None:
    options = study.arguments(__doc__.splitlines()[0], list(VARIANTS)).parse_args()
    results = study.run(options, {name: variant(options, VARIANTS[name]) for name in options.variants})
    rows = [{"order": name} | study.scores(options, results, name, PLAIN, called=PLAIN) for name in options.variants]
    study.finish(options, rows, results, _PAGE, "curricula.md")


def variant(options: Any, settings: dict[str, Any]) -> study.Variant:
    cache = open_cache(options.train)
    # A filter makes an epoch shorter, and all are to make the same steps.
    max_steps = math.ceil(options.epochs * math.ceil(len(cache) / options.batch_sequences))
    length = {"epochs": None, "max_steps": max_steps}
    if "where" in settings:
        losses_N = np.asarray(cache.sequence_table(["teacher_loss"])["teacher_loss"])
        settings = {**settings, "where": f"teacher_loss <= {np.quantile(losses_N, 1 - settings['where']):.6f}"}
    return study.Variant(options.train, {"objective": _objective(), **length, **settings})


if __name__ == "__main__":
    main()
