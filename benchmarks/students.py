"""Compare students trained from caches of several sizes with one trained with the live teacher.

Only the targets differ: the student, the order of the texts and the steps are the same. Everything comes from one dump
of the kind hidden, from which `transcode` makes the smaller caches. All students are evaluated on a held-out cache of
the kind hidden, so their KL to the teacher is exact over the whole vocabulary. Seeds change initial weights and order.
Within a seed all variants share both, so the differences to the live teacher are paired.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import study
from benchmarks.teacher import gguf_path
from kdcache.cache import open_cache
from kdcache.config import build, merge
from kdcache.presets import PRESETS
from kdcache.teachers import TeacherConfig, load_teacher
from kdcache.train import Distiller
from kdcache.transcode import TranscodeConfig, transcode_cache

_KL: dict[str, Any] = {"forward_kl": {"weight": 1.0}, "cross_entropy": {"weight": 0.0}}


def _tail(name: str) -> dict[str, Any]:
    return {"forward_kl": {"weight": 1.0, "tail": name}, "cross_entropy": {"weight": 0.0}}


def _loss(name: str) -> dict[str, Any]:
    return {name: {"weight": 1.0}, "cross_entropy": {"weight": 0.0}}


#: Variant -> (preset of the cache, objective, whether the teacher is in memory).
VARIANTS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "live teacher, full KL": ("hidden", _KL, True),
    "hidden (exact mode)": ("hidden", _KL, False),
    "hidden, and a term on the last states": ("hidden", _KL | {"hidden_cosine": {"weight": 1.0}}, False),
    "hidden-int8": ("hidden-int8", _KL, False),
    "compact, bucket": ("compact", _tail("bucket"), False),
    "compact, prior": ("compact", _tail("prior"), False),
    "compact-32, prior": ("compact-32", _tail("prior"), False),
    "ragged, bucket": ("ragged", _tail("bucket"), False),
    "sampled": ("sampled", _KL, False),
    "hybrid": ("hybrid", _KL, False),
    "hybrid-16": ("hybrid-16", _KL, False),
    "compact, uniform": ("compact", _tail("uniform"), False),
    "compact, renormalised": ("compact", _tail("renormalise"), False),
    "compact, drop": ("compact", _tail("drop"), False),
    "compact, reverse KL": ("compact", _loss("reverse_kl"), False),
    "compact, Jensen-Shannon": ("compact", _loss("jensen_shannon"), False),
    "compact, skew KL": ("compact", _loss("skew_kl"), False),
    "cross-entropy only": ("hidden", {"forward_kl": None, "cross_entropy": {"weight": 1.0}}, False),
}
LIVE = "live teacher, full KL"


class LiveDistiller(Distiller):
    """The same student and objective with the teacher's last hidden states made on the spot."""

    def __init__(self, student: Any, objective: Any, teacher: Any) -> None:
        super().__init__(student, objective)
        self._teacher = (teacher,)  # in a tuple, so that it is no part of what is trained

    def inputs(self, batch: Any) -> Any:
        fed = {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}
        with torch.no_grad():
            states = self._teacher[0].model.base_model(**fed, use_cache=False).last_hidden_state
        return super().inputs({**batch, "teacher_hidden": states.flatten(0, 1)[batch["rows"]].float()})


_PAGE = """# Students from a cache beside the live teacher

Written by `python -m benchmarks.students TRAIN HELD_OUT --work DIR --docs docs` with the settings below, where both
caches were made by `kdcache dump-teacher --preset hidden`; do not edit it by hand.

{facts}

{table}

- *loss*, *KL* and *ECE* on the held-out texts; KL is that of the whole vocabulary. Means over the seeds with the half
  width of their 95 % interval (Student's t). *loss above live* and *KL above live*: the same for the paired differences
  from the student with the live teacher, same seed.
- *bytes/token* of the cache on disk, token ids, scalars and tables included.
- *tokens/s* of training, one thread each, two students side by side on a shared machine.
- All rows train on one loss alone, forward KL unless they say otherwise, so that the targets are what differs. The term
  on the last states is `hidden_cosine` of weight 1 beside it, through a learned projection.
"""


def main() -> None:
    parser = study.arguments(__doc__.splitlines()[0], list(VARIANTS))
    parser.add_argument("--teacher", default=gguf_path(), help="the caches' teacher, for the live variant")
    options = parser.parse_args()
    for preset in dict.fromkeys(VARIANTS[name][0] for name in options.variants):
        make_cache(options, preset)
    results = study.run(options, {name: variant(options, name) for name in options.variants})
    study.finish(options, [row(options, name, results) for name in options.variants], results, _PAGE, "students.md")


def cache_path(options: Any, preset: str) -> str:
    return options.train if preset == "hidden" else str(Path(options.work) / "caches" / preset)


def make_cache(options: Any, preset: str) -> None:
    if preset != "hidden":
        places = {"source": options.train, "output": cache_path(options, preset)}
        settings = merge({**places, "hidden_states": {"layers": []}}, PRESETS[preset].settings)
        transcode_cache(build(TranscodeConfig, settings), progress=False)


def variant(options: Any, name: str) -> study.Variant:
    preset, objective, live = VARIANTS[name]
    make_module = partial(live_module, options.train, options.teacher) if live else None
    return study.Variant(cache_path(options, preset), {"objective": objective}, make_module)


def live_module(cache: str, teacher: str) -> Any:
    manifest = open_cache(cache).manifest
    config = TeacherConfig(model=teacher, dtype=manifest.teacher.dtype, device="cpu")
    return partial(LiveDistiller, teacher=load_teacher(config, manifest.tokenizer.vocab_size))


def row(options: Any, name: str, results: study.Results) -> dict[str, Any]:
    preset, _, live = VARIANTS[name]
    size = f"{open_cache(cache_path(options, preset)).manifest.bytes_per_token:.1f}"
    cells = {"targets": name, "bytes/token": "-" if live or "only" in name else size}
    return cells | study.scores(options, results, name, LIVE, called="live")


if __name__ == "__main__":
    main()
