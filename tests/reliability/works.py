"""The pieces of work that are killed, and how to tell that nothing of what they had finished was lost."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
from safetensors.torch import load_file

from kdcache.cache import layout, open_cache
from kdcache.config import build
from kdcache.dump import dump_teacher
from kdcache.errors import KdcacheError
from kdcache.transcode import TranscodeConfig, transcode_cache
from kdcache.transfer import pull_cache, push_cache
from kdcache.verify.stored import verify_cache
from tests.dump.fake import BigramTeacher, LinearTeacher, run_dump
from tests.reliability.library import Library
from tests.train_runs import settings, train

#: The random part of the names of a shard's objects.
_ATTEMPT = re.compile(r"-[0-9a-f]{8}\.")


@dataclass(frozen=True)
class Work:
    """One command with an output, which resumes when it runs again.

    ``group`` is the command's kind. ``run`` runs it, with the place of the output. ``is_remote``: the output is an
    object store, of which `fetched` makes a local copy to be judged.
    """

    group: str
    name: str
    run: Callable[[str], object]
    is_remote: bool = False
    bytes_alike: bool = False
    """Whether outputs agree in every byte of every file, not only in what they hold."""


def works(library: Library, bucket: str | None = None) -> list[Work]:
    """Return every piece of work; those on an object store only with the URL of a ``bucket``."""
    found = [
        _dump(library, "top-k", {}),
        _dump(
            library, "prior and hidden states", {"targets": {"top_k": 5, "codec": "compact", "tail_prior": True}}, (1,)
        ),
        _dump(library, "ragged", {"targets": {"top_k": 20, "min_prob": 0.01, "codec": "compact", "tail_prior": True}}),
        _dump(library, "hybrid", {"targets": {"kind": "hybrid", "top_k": 4, "num_samples": 25, "codec": "compact"}}),
        _dump(library, "hidden", {"targets": {"kind": "hidden"}}, (1,), LinearTeacher),
        _real_dump(library, "compact"),
        _transcode(library, "exact", {"targets": {"top_k": 3}}),
        _transcode(
            library, "hidden", {"targets": {"kind": "top-k", "top_k": 4, "codec": "compact", "tail_prior": True}}
        ),
        Work("push", "to a directory", _push(library.cache("compact")), bytes_alike=True),
        Work("pull", "from a directory", _pull(str(library.cache("hybrid"))), bytes_alike=True),
        Work("pull", "shards from a directory", _pull(str(library.cache("compact")), [1, 3]), bytes_alike=True),
        _training(library),
    ]
    if bucket is not None:
        source = f"{bucket}/source"
        push_cache(str(library.cache("compact")), source, progress=False)
        found += [
            Work("push", "to S3", _push(library.cache("compact")), is_remote=True, bytes_alike=True),
            Work("push", "shards to S3", _push(library.cache("compact"), [1, 3]), is_remote=True, bytes_alike=True),
            Work("pull", "from S3", _pull(source), bytes_alike=True),
            Work("pull", "shards from S3", _pull(source, [0, 2]), bytes_alike=True),
        ]
    return found


def _dump(
    library: Library, name: str, changes: dict[str, Any], layers: tuple[int, ...] = (), teacher: Any = BigramTeacher
) -> Work:
    def run(output: str) -> object:
        return run_dump(
            library.corpus, output, teacher(), layers=layers, shard_positions=110, batch_tokens=64, **changes
        )

    return Work("dump", name, run)


def _real_dump(library: Library, kind: str) -> Work:
    library.teacher  # noqa: B018 - made before anything is killed
    return Work(
        "dump",
        f"{kind}, of a model",
        lambda output: dump_teacher(library.dump_config(kind, Path(output)), progress=False),
    )


def _transcode(library: Library, source: str, changes: dict[str, Any]) -> Work:
    settings = {"source": str(library.cache(source)), **changes}

    def run(output: str) -> object:
        return transcode_cache(build(TranscodeConfig, {**settings, "output": output}), progress=False)

    return Work("transcode", source, run)


def _push(source: Path, shards: list[int] | None = None) -> Callable[[str], object]:
    return lambda output: push_cache(str(source), output, shards=shards, jobs=3, progress=False)


def _pull(source: str, shards: list[int] | None = None) -> Callable[[str], object]:
    return lambda output: pull_cache(source, output, shards=shards, jobs=3, progress=False)


def _training(library: Library) -> Work:
    cache = library.cache("exact")
    changes = {"max_steps": 5, "save_steps": 2, "save_total_limit": 2, "batch_sequences": 3}
    rates = {"learning_rate": 1e-2, "schedule": "cosine", "max_grad_norm": 1.0}
    return Work(
        "training",
        "with checkpoints",
        lambda output: train(settings(cache, Path(output), **changes, **rates), resume=True),
    )


def fetched(url: str, target: Path) -> Path:
    """Copy every object under ``url`` to ``target`` as it is, without kdcache; return ``target``."""
    target.mkdir(parents=True, exist_ok=True)
    file_system, root = fsspec.core.url_to_fs(url)
    file_system.invalidate_cache()
    for path in file_system.find(root):
        local = target / path.removeprefix(root).lstrip("/")
        local.parent.mkdir(parents=True, exist_ok=True)
        local.write_bytes(file_system.cat_file(path))
    return target


def committed(work: Work, output: Path) -> dict[str, str]:
    """Return the SHA-256 of every file that must never change again, by name.

    Of a cache these are commit records and what they name, of a run the files of complete checkpoints. Raises
    ``FileNotFoundError`` when a record names a file that is not there.
    """
    names: list[str] = []
    if work.group == "training":
        for state in output.glob("checkpoint-*/trainer_state.json"):
            if _is_json(state):
                names += [str(path.relative_to(output)) for path in state.parent.iterdir() if path.is_file()]
    else:
        for record in output.glob("commits/??????.json"):
            objects = json.loads(record.read_text())["objects"].values()
            names += [str(record.relative_to(output)), *(item["path"] for item in objects)]
    return {name: hashlib.sha256((output / name).read_bytes()).hexdigest() for name in names}


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text())
    except ValueError:
        return False
    return True


def problem_when_killed(work: Work, output: Path) -> str | None:
    """Say what is wrong with what a killed command left: it is no cache yet, or a sound one."""
    if work.group == "training":
        return None
    try:
        open_cache(str(output)).close()
    except KdcacheError:
        return None
    problems = verify_cache(str(output), progress=False).problems
    return f"it has a manifest, and verify finds {problems}" if problems else None


def difference(work: Work, output: Path, reference: Path) -> str | None:
    """Say how a finished output differs from that of a command that nobody killed; None where it does not."""
    names, expected = _names(output), _names(reference)
    if names != expected:
        return f"files left {sorted(names - expected)}, files missing {sorted(expected - names)}"
    return (
        _run_difference(output, reference) if work.group == "training" else _cache_difference(work, output, reference)
    )


def _names(output: Path) -> set[str]:
    files = (str(path.relative_to(output)) for path in output.rglob("*") if path.is_file() and path.name != ".lock")
    return {_ATTEMPT.sub("-ATTEMPT.", name) for name in files}


def _cache_difference(work: Work, output: Path, reference: Path) -> str | None:
    if problems := verify_cache(str(output), deep=True, progress=False).problems:
        return f"verify --deep finds {problems}"
    contents = []
    for path in (output, reference):
        with open_cache(str(path)) as cache:
            manifest = cache.manifest
        contents.append(
            {(shard.index, name): item.sha256 for shard in manifest.shards for name, item in shard.objects.items()}
        )
    if contents[0] != contents[1]:
        return f"objects differ: {sorted(key for key in contents[0] if contents[0][key] != contents[1].get(key))}"
    same = [name for name in _names(reference) if work.bytes_alike or not name.endswith(".json") or "/" not in name]
    timed = () if work.bytes_alike else (layout.MANIFEST, layout.PLAN)  # when and by which command they were made
    for name in sorted(set(same) - set(timed)):
        if "ATTEMPT" not in name and (output / name).read_bytes() != (reference / name).read_bytes():
            return f"{name} differs"
    return None


def _run_difference(output: Path, reference: Path) -> str | None:
    weights, expected = (load_file(path / "model.safetensors") for path in (output, reference))
    if weights.keys() != expected.keys() or not all(weights[name].equal(expected[name]) for name in expected):
        return "weights differ"
    histories = [json.loads((path / "kdcache_run.json").read_text())["history"] for path in (output, reference)]
    steps = [[(line["step"], line["epoch"], line["loss"]) for line in history] for history in histories]
    return None if steps[0] == steps[1] else f"histories differ: {steps[0]}, {steps[1]}"
