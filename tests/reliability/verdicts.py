"""What a case may end with, and the counts of many cases."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum


class Verdict(StrEnum):
    """How a case ended."""

    REFUSED = "refused"
    """A `KdcacheError` said what is wrong."""
    WORKED = "worked"
    """Nothing went wrong, and the result is the right one."""
    HARMLESS = "harmless"
    """Bytes changed that no result depends on, such as white space between the members of a record."""

    LOST = "lost"
    """A committed file changed, the command that was killed does not finish, or its result is another one."""
    SILENT = "silent"
    """Bytes changed, a result with them, and no error said so."""
    UNSEEN = "unseen"
    """``kdcache verify`` called a damaged cache sound."""
    TRACEBACK = "traceback"
    """Any error but `KdcacheError`, or a process that a signal ended."""
    OUTSIDE = "outside"
    """A file changed that belongs neither to the cache nor to the command's output."""
    TERMINAL = "terminal"
    """A control character of the cache was written raw."""
    HANG = "hang"
    """No answer within the time limit."""
    MEMORY = "memory"
    """No answer within the memory limit."""


#: What must never happen.
FAILURES = tuple(verdict for verdict in Verdict if verdict not in (Verdict.REFUSED, Verdict.WORKED, Verdict.HARMLESS))


@dataclass(frozen=True)
class Finding:
    """One thing that went wrong in a case."""

    case: int
    verdict: Verdict
    what: str


@dataclass
class Result:
    """What one case found: how often each step ended in which way, and everything that went wrong."""

    case: int
    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    """By (step, verdict or another word), such as ("verify", "refused")."""
    findings: list[Finding] = field(default_factory=list)

    def add(self, step: str, verdict: Verdict | str, what: str = "") -> None:
        """Count the end of a step; what must not happen becomes a finding that ``what`` describes."""
        self.counts[step, str(verdict)] += 1
        if verdict in FAILURES:
            self.findings.append(Finding(self.case, Verdict(verdict), f"{step}: {what}"))


@dataclass
class Tally:
    """The sums of many cases of an engine."""

    engine: str
    num_cases: int = 0
    seconds: float = 0.0
    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    findings: list[Finding] = field(default_factory=list)

    def add(self, result: Result) -> None:
        """Add one case."""
        self.num_cases += 1
        self.counts.update(result.counts)
        self.findings.extend(result.findings)

    def table(self) -> str:
        """Return the counts as a table: a line for each step, a column for each word that occurred, failures always."""
        steps = sorted({step for step, _ in self.counts})
        occurred = {word for _, word in self.counts}
        words = [*sorted(occurred - set(FAILURES)), *FAILURES]
        rows = [["step", *words]]
        rows += [
            [step, *(f"{self.counts[step, word]:,}" if self.counts[step, word] else "." for word in words)]
            for step in steps
        ]
        totals = [sum(self.counts[step, word] for step in steps) for word in words]
        rows += [["all", *(f"{total:,}" for total in totals)]]
        widths = [max(len(row[column]) for row in rows) for column in range(len(words) + 1)]
        lines = [
            "  ".join(
                cell.rjust(width) if n else cell.ljust(width)
                for n, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        ]
        return f"{self.engine}: {self.num_cases:,} cases in {self.seconds:,.0f} s\n" + "\n".join(lines)
