"""Presets: settings of a dump that go well together, from the fewest bytes to the whole distribution.

``kdcache dump-teacher --preset NAME`` puts one under the other options, ``kdcache estimate`` measures them all on your
corpus, and the benchmark ``fidelity`` writes docs/fidelity.md from them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Preset:
    """A line on when to use the preset, and its settings of a dump."""

    description: str
    settings: Mapping[str, Any]


def _top_k(top_k: int, codec: str = "compact", **more: Any) -> dict[str, Any]:
    return {
        "targets": {
            "kind": "top-k",
            "top_k": top_k,
            "num_samples": 0,
            "tail_prior": True,
            "codec": {"name": codec},
            "min_prob": 0.0,
            **more,
        }
    }


def _samples(kind: str, top_k: int, num_samples: int) -> dict[str, Any]:
    return {"targets": {"kind": kind, "top_k": top_k, "num_samples": num_samples, "tail_prior": False}}


def _hidden(codec: str) -> dict[str, Any]:
    targets = {"kind": "hidden", "top_k": 1, "num_samples": 0, "tail_prior": False}
    return {"targets": targets, "hidden_states": {"codec": {"name": codec}}}


# Every number is set, so that a preset means the same over any configuration file.
PRESETS: dict[str, Preset] = {
    "compact": Preset("top 64 and the exact tail; the default", _top_k(64)),
    "compact-32": Preset("top 32 and the exact tail", _top_k(32)),
    "ragged": Preset("of the top 64 those with p >= 0.001", _top_k(64, min_prob=0.001)),
    "sampled": Preset("50 samples: fewest bytes, unbiased, T = 1 only", _samples("sampled", 0, 50)),
    "hybrid": Preset("top 4 exactly and 16 samples from the rest, T = 1 only", _samples("hybrid", 4, 16)),
    "hybrid-16": Preset(
        "top 16 exactly and 48 samples from the rest: less noise, T = 1 only", _samples("hybrid", 16, 48)
    ),
    "hidden": Preset("last hidden state in bfloat16: exact at any T", _hidden("bf16")),
    "hidden-int8": Preset("last hidden state in 8 bits: any T, half the bytes", _hidden("int8")),
    "fp16": Preset("top 64 as float16, for comparison", _top_k(64, "fp16")),
    "bf16": Preset("top 64 as bfloat16, for comparison", _top_k(64, "bf16")),
    "exact": Preset("top 64 in float32, for proofs", _top_k(64, "exact")),
}
