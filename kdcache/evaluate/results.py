"""The result of an evaluation: the teacher's row, one row per student, and the table of them."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from kdcache.config import Config
from kdcache.json_files import finite
from kdcache.table import render_table


class ModelRow(Config):
    """The metrics of one model; losses, KL and entropy in nats. None: unknown or not defined."""

    model: str
    num_parameters: int | None
    loss: float | None = None
    """Mean negative log-likelihood of the labels."""
    perplexity: float | None = None
    top1_accuracy: float | None = None
    ece: float | None = None
    kl: float | None = None
    agreement: float | None = None
    """Share of positions where teacher and student have the same top-1 token or class."""
    entropy: float | None = None
    kept_mass: float | None = None
    metrics: dict[str, float | None] = Field(default_factory=dict)
    """Further metrics of the task, by the names of ``kdcache.evaluate.measures``."""
    num_bytes: int | None = None
    tokens_per_s: float | None = None
    num_trained_on: int | None = None
    """How many of the sequences the student was trained on; None where its run does not tell."""
    warnings: tuple[str, ...] = ()


class Evaluation(Config):
    """The teacher's row, one row per student, and the sequences that they were evaluated on."""

    cache: str
    fingerprint: str
    where: str | None = None
    """The filter that selected the sequences; None: the whole cache."""
    num_sequences: int
    num_targets: int
    """Valid positions."""
    teacher: ModelRow
    students: tuple[ModelRow, ...]

    @property
    def warnings(self) -> tuple[str, ...]:
        """The warnings of all students."""
        return tuple(warning for row in self.students for warning in row.warnings)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON types; None for a perplexity that is infinite."""
        data: dict[str, Any] = finite(self.model_dump(mode="json"))
        return data

    def table(self, *, markdown: bool = False) -> str:
        """Return the rows as an aligned text table, or in Markdown, with warnings below."""
        rows = [self.teacher, *self.students]
        names = dict.fromkeys(name for row in rows for name in row.metrics)
        columns = {**_COLUMNS, **{name: (name.replace("_", " "), ".4f") for name in names}, **_LAST_COLUMNS}
        lines = [render_table(columns, [_Cells(row) for row in rows], markdown=markdown)]
        return "\n".join([*lines, *(f"warning: {warning}" for warning in self.warnings)])


_COLUMNS: dict[str, tuple[str, str]] = {
    "model": ("model", "s"),
    "num_parameters": ("parameters", ",d"),
    "num_bytes": ("bytes", ",d"),
    "loss": ("loss", ".4f"),
    "perplexity": ("perplexity", ".3f"),
    "kl": ("KL", ".4f"),
    "agreement": ("agreement", ".4f"),
    "top1_accuracy": ("top-1", ".4f"),
    "ece": ("ECE", ".4f"),
    "entropy": ("entropy", ".4f"),
    "kept_mass": ("kept mass", ".4f"),
}
_LAST_COLUMNS: dict[str, tuple[str, str]] = {"tokens_per_s": ("tokens/s", ",.0f")}


class _Cells:
    """A row with its metrics as attributes, for `render_table`."""

    def __init__(self, row: ModelRow) -> None:
        self._row = row

    def __getattr__(self, name: str) -> Any:
        return self._row.metrics.get(name) if name not in ModelRow.model_fields else getattr(self._row, name)
