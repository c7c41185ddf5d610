"""Try it at length: ``python -m tests.reliability --seed 7 --corruptions 10000 --manifests 1000 --kills 100 --jobs 2``.

Prints a line of progress to standard error every few seconds, then a table for each engine and every failure with the
command that repeats it. Exits with 1 if there was one.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch
import tqdm
import transformers

from tests.object_store import environment, running_server
from tests.reliability.children import Engine, run_cases
from tests.reliability.corruption import Corruption
from tests.reliability.kills import GROUPS, EveryOperation, RandomKills
from tests.reliability.library import Library
from tests.reliability.manifests import Manifests
from tests.reliability.verdicts import Tally

#: Seconds between two lines of progress.
_PROGRESS_S = 10.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the arguments ask for; return the exit code."""
    options = _options(arguments)
    torch.set_num_threads(1)
    logging.getLogger().setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    # tqdm's own lock is shared by forked processes: one that is killed would keep it.
    tqdm.tqdm.set_lock(threading.RLock())
    wanted = _wanted(options)
    with (
        tempfile.TemporaryDirectory(prefix="kdcache-reliability-", dir=options.work) as directory,
        ExitStack() as stack,
    ):
        root = Path(directory)
        library = Library(root / "library")
        tallies = []
        for name, cases in wanted.items():
            engine = _engine(name, library, options, stack)
            if cases is None:
                assert isinstance(engine, EveryOperation)
                cases = range(len(engine))
            elif isinstance(engine, EveryOperation):
                cases = [case for case in cases if case < len(engine)]
            tallies.append(_campaign(engine, cases, options.jobs, root))
    return _report(tallies, options.seed)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.reliability", description=__doc__)
    add = parser.add_argument
    add("--seed", type=int, default=0, help="of every random choice; default 0")
    add("--corruptions", type=int, default=0, metavar="N", help="damaged files")
    add("--manifests", type=int, default=0, metavar="N", help="manifests with a nonsensical member")
    add("--operations", metavar="N", help="kills at an operation on a file: so many of them, or 'all'")
    add(
        "--kills",
        type=int,
        default=0,
        metavar="N",
        help="runs that are killed at random, of each of: " + ", ".join(GROUPS),
    )
    add("--no-store", action="store_true", help="push to directories and pull from them alone, start no object store")
    add("--jobs", type=int, default=2, metavar="N", help="processes at once; default 2")
    add("--case", metavar="ENGINE:N", help="run this case alone")
    add("--work", type=Path, help="where to work; default: the directory of temporary files")
    return parser.parse_args(arguments)


def _wanted(options: argparse.Namespace) -> dict[str, Sequence[int] | None]:
    """The cases of every engine that is asked for; None: all that there are."""
    if options.case:
        name, _, number = options.case.partition(":")
        return {name: [int(number)]}
    operations = options.operations
    wanted: dict[str, Sequence[int] | None] = {
        Corruption.name: range(options.corruptions),
        Manifests.name: range(options.manifests),
        EveryOperation.name: None if operations == "all" else range(int(operations or 0)),
        RandomKills.name: range(options.kills * len(GROUPS)),
    }
    return {name: cases for name, cases in wanted.items() if cases is None or len(cases)}


def _engine(name: str, library: Library, options: argparse.Namespace, stack: ExitStack) -> Engine:
    if name == Corruption.name:
        return Corruption(library, options.seed)
    if name == Manifests.name:
        return Manifests(library, options.seed)
    if name == EveryOperation.name:
        return EveryOperation(library, options.seed)
    if name == RandomKills.name:
        return RandomKills(library, options.seed, None if options.no_store else _bucket(stack))
    raise SystemExit(f"there is no engine {name!r}")


def _bucket(stack: ExitStack) -> str:
    """Start an object store on this machine; return the URL of an empty bucket in it."""
    os.environ.update(environment(stack.enter_context(running_server())))
    # In a process of its own: a client has threads, which a fork would not copy.
    made = os.fork()
    if made == 0:
        import s3fs

        s3fs.S3FileSystem().mkdir("reliability")
        os._exit(0)
    assert os.waitpid(made, 0)[1] == 0
    return "s3://reliability"


def _campaign(engine: Engine, cases: Sequence[int], jobs: int, root: Path) -> Tally:
    """Run the cases of one engine and say how far it is."""
    tally, began_s = Tally(engine.name), time.monotonic()
    said_s = began_s
    for result in run_cases(engine, cases, jobs=jobs, work=root):
        tally.add(result)
        for finding in result.findings:
            print(f"{engine.name}:{finding.case} {finding.verdict}: {finding.what}", file=sys.stderr, flush=True)
        if time.monotonic() - said_s > _PROGRESS_S:
            said_s = time.monotonic()
            per_case_s = (said_s - began_s) / tally.num_cases
            left_s = per_case_s * (len(cases) - tally.num_cases)
            progress = f"{engine.name}: {tally.num_cases:,} of {len(cases):,}, {len(tally.findings)} failures"
            print(f"{progress}, {left_s:.0f} s left", file=sys.stderr, flush=True)
    tally.seconds = time.monotonic() - began_s
    return tally


def _report(tallies: Sequence[Tally], seed: int) -> int:
    findings = 0
    for tally in tallies:
        print(tally.table(), end="\n\n")
        for finding in tally.findings:
            again = f"python -m tests.reliability --seed {seed} --case {tally.engine}:{finding.case}"
            print(f"{finding.verdict}: {finding.what}\n    {again}")
        findings += len(tally.findings)
    print(f"{findings} failures" if findings else "no failures")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
