"""Presets: settings of a dump that go well together, from the fewest bytes to everything the teacher knows.

``kdcache dump-teacher --preset NAME`` lays one under the other options, ``kdcache estimate`` measures them all on a
corpus of yours, and the benchmark ``fidelity`` writes docs/fidelity.md from them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Preset:
    """What a preset is for, in a line, and the settings of a dump that it stands for."""

    description: str
    settings: Mapping[str, Any]


PRESETS: dict[str, Preset] = {
    "compact": Preset("top 64 and the exact tail; the default", {"targets": {"kind": "top-k"}}),
    "compact-32": Preset("top 32 and the exact tail", {"targets": {"kind": "top-k", "top_k": 32}}),
    "ragged": Preset("of the top 64 those with p >= 0.001", {"targets": {"kind": "top-k", "min_prob": 0.001}}),
    "sampled": Preset("50 draws: fewest bytes, unbiased, T = 1 only", {"targets": {"kind": "sampled"}}),
    "hybrid": Preset("top 4 exactly and 16 draws from the rest, T = 1 only", {"targets": {"kind": "hybrid"}}),
    "hybrid-16": Preset(
        "top 16 exactly and 48 draws from the rest: less noise, T = 1 only",
        {"targets": {"kind": "hybrid", "top_k": 16, "num_draws": 48}},
    ),
    "hidden": Preset("last hidden state in bfloat16: exact at any T", {"targets": {"kind": "hidden"}}),
    "hidden-int8": Preset(
        "last hidden state in 8 bits: any T, half the bytes",
        {"targets": {"kind": "hidden"}, "hidden_states": {"codec": {"name": "int8"}}},
    ),
    "fp16": Preset("top 64 as float16, for comparison", {"targets": {"kind": "top-k", "codec": {"name": "fp16"}}}),
    "bf16": Preset("top 64 as bfloat16, for comparison", {"targets": {"kind": "top-k", "codec": {"name": "bf16"}}}),
    "exact": Preset("top 64 in float32, for proofs", {"targets": {"kind": "top-k", "codec": {"name": "exact"}}}),
}
