"""Teacher-written targets: what the teacher would answer, instead of the corpus's own targets.

`write_targets` makes a corpus of texts: one line per document, in order, with the input, the teacher's text as
``target``, the corpus's own as ``reference``, and all other columns. It is dumped and trained on like any other corpus.

Documents are written in blocks whose borders depend on the corpus alone, and within a block in batches of similar
length. So an interrupted run resumes at the block that it was in and makes the same file (up to rounding: on another
device, another one of nearly equal texts may be the best). Not for causal teachers: their continuation of an input is
not a target of it.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kdcache.progress import bar
from kdcache.write.config import WriteConfig
from kdcache.write.output import TargetsFile, check_output, complete_lines
from kdcache.write.writer import WriteCounts, Writer

#: Documents that are written to the file at once; an interrupted run loses at most so many.
_BLOCK = 64
_PILOT = 16


@dataclass
class WriteResult:
    """What this run added to the file; counts are those of this run alone."""

    output: str
    num_documents: int
    counts: WriteCounts
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON types."""
        more = {"seconds": self.seconds, "tokens_per_s": self.counts.num_tokens / max(self.seconds, 1e-9)}
        return {"output": self.output, "num_documents": self.num_documents, **asdict(self.counts), **more}


@dataclass
class TargetsPreview:
    """The time that the remaining documents would take, from a pilot of the first ones, and examples of its texts."""

    output: str
    num_documents: int
    num_done: int
    num_pilot: int
    """Documents of the pilot; the counts are those of the pilot."""
    pilot: WriteCounts
    tokens_per_s: float
    eta_s: float
    examples: list[dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON types."""
        return asdict(self)


def write_targets(config: WriteConfig, *, progress: bool = True) -> WriteResult:
    """Write the teacher's target for every input of the corpus of ``config``, or resume that.

    Raises ``ConfigError`` (also for an output that was begun with other settings), ``CorpusError`` or ``TeacherError``;
    lines that were written before stay.
    """
    writer = Writer(config)
    counts = WriteCounts()
    began = time.perf_counter()
    with TargetsFile(Path(config.output), writer.settings) as file:
        num_done, total = file.num_lines, len(writer.corpus)
        with bar(total, "write", "doc", enabled=progress, initial=num_done) as meter:
            for start, rows in writer.corpus.iter_rows(_BLOCK):
                if start + len(rows) <= num_done:
                    continue
                lines = writer.lines(start, rows, counts)
                new = lines[max(0, num_done - start) :]
                file.append(new)
                counts.num_written += len(new)
                meter.set_postfix_str(f"{counts.num_tokens / (time.perf_counter() - began):.0f} tokens/s")
                meter.update(len(new))
    return WriteResult(config.output, total, counts, time.perf_counter() - began)


def preview_targets(config: WriteConfig) -> TargetsPreview:
    """Time the teacher on the first documents and estimate the time of the whole corpus; writes nothing."""
    writer = Writer(config)
    check_output(Path(config.output), writer.settings)
    _, rows = next(writer.corpus.iter_rows(_PILOT))
    counts = WriteCounts()
    began = time.perf_counter()
    lines = writer.lines(0, rows, counts)
    seconds = time.perf_counter() - began
    num_done, _ = complete_lines(Path(config.output))
    return TargetsPreview(
        config.output,
        len(writer.corpus),
        num_done,
        len(rows),
        counts,
        counts.num_tokens / max(seconds, 1e-9),
        seconds / len(rows) * (len(writer.corpus) - num_done),
        [line for line in lines if line["target"] is not None][:2],
    )
