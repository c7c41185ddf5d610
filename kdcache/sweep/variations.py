"""From the settings of a sweep to those of every student: names, products, seeds. Opens and loads nothing."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kdcache.config import build, merge, nest
from kdcache.errors import ConfigError
from kdcache.sweep.config import SweepConfig
from kdcache.train import TrainConfig

#: Longest name of a student; most file systems allow 255 bytes for the name of a directory.
MAX_NAME = 200


@dataclass(frozen=True)
class Variation:
    """One student to train: ``group`` names its variation, which is repeated for every ``seed`` (None without seeds).

    ``changes`` are its changes to the shared settings, by dotted keys.
    """

    name: str
    group: str
    seed: int | None
    changes: dict[str, Any]
    config: TrainConfig


def expand(config: SweepConfig) -> list[Variation]:
    """Return every student of a sweep in the order of the file, the seeds of a variation next to each other.

    Raises ``ConfigError`` naming the variation whose settings are wrong, and for names that are not unique.
    """
    shared = config.shared_settings()
    variations = [
        _variation(config, shared, group, changes, seed)
        for group, changes in _groups(config)
        for seed in (config.seeds or (None,))
    ]
    _check_names(variations)
    return variations


def _groups(config: SweepConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the name and the nested changes of every variation."""
    if config.grid:
        labels = _labels(list(config.grid))
        shown = (list(zip(_texts(values), values, strict=True)) for values in config.grid.values())
        for choice in itertools.product(*shown):
            chosen = dict(zip(config.grid, choice, strict=True))
            name = ",".join(f"{labels[key]}={text}" for key, (text, _) in chosen.items())
            yield name, _tree({key: value for key, (_, value) in chosen.items()})
    for run in config.runs:
        yield run.name, _tree(run.set)
    if not config.grid and not config.runs:
        yield "base", {}


def _labels(keys: Sequence[str]) -> dict[str, str]:
    """Return for every dotted key its shortest unique suffix."""
    ends = {key: [".".join(key.split(".")[start:]) for start in range(key.count("."), -1, -1)] for key in keys}
    count = Counter(end for own in ends.values() for end in own)
    return {key: next((end for end in own if count[end] == 1), key) for key, own in ends.items()}


def _texts(values: Sequence[Any]) -> list[str]:
    """Return the values of a key as parts of names; different values that look the same get their numbers."""
    texts = [_shown(value, number) for number, value in enumerate(values)]
    alike: dict[str, set[str]] = {}
    for text, value in zip(texts, values, strict=True):
        alike.setdefault(text.casefold(), set()).add(repr(value))
    return [f"{text}-{n}" if len(alike[text.casefold()]) > 1 else text for n, text in enumerate(texts)]


def _shown(value: Any, number: int) -> str:
    """Return a value as part of a directory's name; lists and mappings by their number in the grid."""
    if isinstance(value, Mapping | list):
        return str(number)
    text = json.dumps(value) if value is None or isinstance(value, bool) else str(value)
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", text).rstrip("-") or str(number)


def _tree(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings by dotted keys as a nested mapping."""
    tree: dict[str, Any] = {}
    for key, value in settings.items():
        tree = merge(tree, nest(key, value))
    return tree


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a nested mapping by dotted keys, ``{"a.b": 1}`` for ``{"a": {"b": 1}}``."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _variation(
    config: SweepConfig, shared: Mapping[str, Any], group: str, changes: dict[str, Any], seed: int | None
) -> Variation:
    name = group if seed is None else f"{group}-seed{seed}"
    where = f"variation {group}"
    settings = merge(dict(shared), changes)
    if "output" in settings:
        raise ConfigError(
            f"{where}: output cannot be set, each student gets the directory {config.output}/<name>; remove it"
        )
    if seed is not None:
        settings = merge(settings, _seed_settings(flatten(changes), seed, where))
    # Students that train at the same time share the local store of a remote cache.
    num_processes = config.jobs or max(torch.cuda.device_count(), 1)
    settings = merge({"local_store": {"num_processes": num_processes}}, settings)
    built = build(TrainConfig, {**settings, "output": str(Path(config.output, name))}, source=where)
    return Variation(name, group, seed, flatten(changes), built)


def _seed_settings(changes: Mapping[str, Any], seed: int, where: str) -> dict[str, Any]:
    own = [key for key in ("seed", "student.seed") if key in changes]
    if own:
        raise ConfigError(f"{where} sets {own[0]}, and seeds sets it for every variation; give one of them")
    # A pretrained student uses its seed for adapters only.
    return {"seed": seed, "student": {"seed": seed}}


def _check_names(variations: Sequence[Variation]) -> None:
    longest = max((variation.name for variation in variations), key=len)
    if len(longest) > MAX_NAME:
        raise ConfigError(
            f"the name {longest[:60]}... has {len(longest)} characters, and a directory's at most {MAX_NAME}: list "
            "this variation under runs, with a name"
        )
    # Without regard to case, because some file systems have none.
    count = Counter(variation.name.casefold() for variation in variations)
    twice = [variation.name for variation in variations if count[variation.name.casefold()] > 1]
    if twice:
        raise ConfigError(
            f"two variations are called {twice[0]!r}, and each needs a directory of its own: give every entry of runs "
            "another name, and list every value of the grid once"
        )
