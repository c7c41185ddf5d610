"""Terms over raw outputs: the numbers that student and teacher answer a row with.

Scores of a regressor, logits of classes before any softmax, embeddings. Nothing here has parameters: where student and
teacher differ in width, the student has a layer of its own for it, which is saved with the student.

Row by row: `OutputMSE`, `OutputCosine`, `LabelMSE`.

Texts with each other: `SimilarityMatrix` learns from the teacher which texts of a micro-batch are alike, whatever the
two widths. `Contrastive` and `LabelCosine` know no teacher: they are what a student is trained on without distillation,
or beside it. The texts of a pair are the two rows of one sequence (`Outputs.groups_P`), which no micro-batch separates.
A value of a pair stands at both of its rows, and rows without a pair have 0. Everything is computed from cosines, so
lengths play no part. `SimilarityMatrix` and `Contrastive` depend on which texts share a micro-batch: a larger
``batch_sequences`` changes them, unlike ``gradient_accumulation``.

Documents of one query: `MarginMSE`, `ListwiseKL`, `ListCrossEntropy`. The rows of a query are a group. These are losses
of a query, and the value at each of its rows is that of the query. So the mean over rows, which the objective makes,
weighs a query by its documents, weights mean the same for short and long lists, and a query with one document, which
cannot be put in any order, has 0. Groups are padded to a grid [Q, M] where a softmax wants them side by side; no query
is ever split, as its documents are one sequence of the cache.

Shape suffixes: P flat rows, C outputs of a row, Q pairs or queries, M most documents of a query.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from kdcache.losses.base import LayerStates, Needs, Outputs, Term, TermModule
from kdcache.losses.kernel import at_least_float32
from kdcache.losses.schedules import Temperature
from kdcache.losses.teacher import TeacherContext


class OutputTerm(Term):
    """Base of terms without parameters over the outputs at a row."""

    needs = "the teacher's raw outputs"
    same_width: ClassVar[bool] = False
    """Whether the outputs of student and teacher have to be equally wide."""

    @abstractmethod
    def compare(self, outputs: Outputs) -> Tensor:
        """Return the value of each row, [P]; outputs are in float32 at least."""

    def incompatibility(self, context: TeacherContext) -> str | None:
        """Return why the term makes no sense with such a cache and what to do instead; None if it does."""
        if context.has("outputs"):
            return None
        return f"it needs {self.needs}, and the cache holds {context.holds}; caches of tasks about tokens have none"

    def build(self, context: TeacherContext, student_widths: Sequence[int], generator: torch.Generator) -> TermModule:
        """Return the module, which has nothing to learn."""
        return OutputModule(self)


class OutputModule(TermModule):
    """A term over outputs as a module."""

    needs = Needs(outputs=True)

    def __init__(self, term: OutputTerm) -> None:
        super().__init__()
        self._term = term

    def forward(self, states: LayerStates) -> Tensor:
        """Return the value of each row, [P]."""
        outputs = states.outputs
        assert outputs is not None
        student_PC = at_least_float32(outputs.student_PC)
        return self._term.compare(outputs.with_student(student_PC))

    def describe(self) -> dict[str, object]:
        """Return nothing: nothing was decided."""
        return {}


class OutputMSE(OutputTerm):
    """Mean squared error of the outputs, the mean over the width."""

    same_width: ClassVar[bool] = True

    def compare(self, outputs: Outputs) -> Tensor:
        """Return the error of each row, [P]."""
        return (outputs.student_PC - outputs.teacher_PC).square().mean(1)


class OutputCosine(OutputTerm):
    """1 - cosine of the outputs: their direction, whatever their length."""

    same_width: ClassVar[bool] = True

    def compare(self, outputs: Outputs) -> Tensor:
        """Return the distance of each row, [P]."""
        return 1 - nn.functional.cosine_similarity(outputs.student_PC, outputs.teacher_PC, dim=1)


class LabelMSE(OutputTerm):
    """Squared error of the student's score and the corpus's own; 0 where the corpus has none.

    The teacher plays no part: it is the loss that a regressor is trained on without distillation.
    """

    needs = "the corpus's labels, which are numbers"
    uses_teacher = False

    def incompatibility(self, context: TeacherContext) -> str | None:
        """Return why the term makes no sense with such a cache and what to do instead; None if it does."""
        if context.outputs is not None and context.outputs.width > 1:
            return f"it compares one score with one number, and the outputs are {context.outputs.width} wide"
        return super().incompatibility(context)

    def compare(self, outputs: Outputs) -> Tensor:
        """Return the error of each row, [P]."""
        labels_P = outputs.labels_P
        errors_P = (outputs.student_PC[:, 0] - labels_P.nan_to_num()).square()
        return torch.where(labels_P.isnan(), 0.0, errors_P)


def pairs_of(groups_P: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows of the first and of the second text of every pair, [Q] each."""
    first_Q = (groups_P[1:] == groups_P[:-1]).nonzero().squeeze(1)
    return first_Q, first_Q + 1


def _unit(vectors_PC: Tensor) -> Tensor:
    return nn.functional.normalize(vectors_PC, dim=1)


class EmbeddingTerm(OutputTerm):
    """Base of terms that compare embeddings with each other."""

    def incompatibility(self, context: TeacherContext) -> str | None:
        """Return why the term makes no sense with such a cache and what to do instead; None if it does."""
        if context.outputs is not None and context.outputs.pooling is None:
            return "it compares embeddings, and the outputs of this cache are none; use a cache of task embedding"
        return super().incompatibility(context)


class SimilarityMatrix(EmbeddingTerm):
    """Squared error of the cosine of a text with each other text of the micro-batch, the mean over those.

    The value of a row depends on what else is in its micro-batch; alone it is 0. Student and teacher may differ in
    width.
    """

    def compare(self, outputs: Outputs) -> Tensor:
        """Return the error of each row, [P]."""
        student_PC, teacher_PC = _unit(outputs.student_PC), _unit(outputs.teacher_PC)
        errors_PP = (student_PC @ student_PC.T - teacher_PC @ teacher_PC.T).square()
        # Each text is as like itself as can be, to both models.
        others_PP = 1 - torch.eye(len(errors_PP), dtype=errors_PP.dtype, device=errors_PP.device)
        return (errors_PP * others_PP).sum(1) / max(len(errors_PP) - 1, 1)


class PairTerm(EmbeddingTerm):
    """Base of terms over pairs of texts, in which the teacher plays no part."""

    needs = "the corpus's pairs of texts"
    uses_teacher = False
    needs_pairs = True


class Contrastive(PairTerm):
    """Find the second text of a pair among those of all pairs of the micro-batch: cross-entropy of scaled cosines.

    Pairs of a corpus without labels belong together. Of pairs that have a label only those of ``min_label`` or more do,
    none unless it is given. The others take no part.

    Source: van den Oord et al., "Representation Learning with Contrastive Predictive Coding", 2018 (InfoNCE);
    Henderson et al., "Efficient Natural Language Response Suggestion for Smart Reply", 2017 (in-batch negatives).
    """

    scale: float = Field(default=20.0, gt=0, allow_inf_nan=False)
    """Cosines are multiplied by it; 1 / scale is the temperature."""
    min_label: float | None = Field(default=None, allow_inf_nan=False)

    def compare(self, outputs: Outputs) -> Tensor:
        """Return the loss of each row's pair, [P]."""
        first_Q, second_Q = pairs_of(outputs.groups_P)
        labels_Q = outputs.labels_P[first_Q]
        belongs_Q = labels_Q.isnan() if self.min_label is None else labels_Q.isnan() | (labels_Q >= self.min_label)
        first_Q, second_Q = first_Q[belongs_Q], second_Q[belongs_Q]
        unit_PC = _unit(outputs.student_PC)
        scores_QQ = self.scale * unit_PC[first_Q] @ unit_PC[second_Q].T
        values_Q = -scores_QQ.log_softmax(1).diagonal()
        return _at_pairs(values_Q, first_Q, second_Q, outputs)


class LabelCosine(PairTerm):
    """Squared error of the cosine of a pair and its label divided by ``label_scale``; 0 where there is no label.

    A label of ``label_scale`` stands for a cosine of 1, so it is 5 for judgements from 0 to 5.
    """

    label_scale: float = Field(default=1.0, gt=0, allow_inf_nan=False)

    def compare(self, outputs: Outputs) -> Tensor:
        """Return the error of each row's pair, [P]."""
        first_Q, second_Q = pairs_of(outputs.groups_P)
        known_Q = ~outputs.labels_P[first_Q].isnan()
        first_Q, second_Q = first_Q[known_Q], second_Q[known_Q]
        cosine_Q = nn.functional.cosine_similarity(outputs.student_PC[first_Q], outputs.student_PC[second_Q], dim=1)
        errors_Q = (cosine_Q - outputs.labels_P[first_Q] / self.label_scale).square()
        return _at_pairs(errors_Q, first_Q, second_Q, outputs)


def _at_pairs(values_Q: Tensor, first_Q: Tensor, second_Q: Tensor, outputs: Outputs) -> Tensor:
    """Return the value of each pair at both of its rows, and 0 at all others, [P]."""
    zeros_P = outputs.student_PC.new_zeros(len(outputs.student_PC))
    return zeros_P.index_put((torch.cat([first_Q, second_Q]),), torch.cat([values_Q, values_Q]))


@dataclass(frozen=True)
class Groups:
    """Which query every row belongs to, [P], how many documents each query has, [Q], and a row's place among them."""

    query_P: Tensor
    counts_Q: Tensor
    place_P: Tensor

    @classmethod
    def of(cls, groups_P: Tensor) -> Groups:
        """Return the groups of rows with the same number, which stand next to each other."""
        _, query_P, counts_Q = groups_P.unique_consecutive(return_inverse=True, return_counts=True)
        starts_Q = counts_Q.cumsum(0) - counts_Q
        return cls(query_P, counts_Q, torch.arange(len(groups_P), device=groups_P.device) - starts_Q[query_P])

    def sum(self, values_P: Tensor) -> Tensor:
        """Return the sum over the rows of each query, [Q]."""
        return values_P.new_zeros(len(self.counts_Q)).index_add(0, self.query_P, values_P)

    def mean(self, values_P: Tensor) -> Tensor:
        """Return the mean over the rows of each query, [Q]."""
        return self.sum(values_P) / self.counts_Q

    def log_softmax(self, scores_P: Tensor) -> Tensor:
        """Return the log-softmax over the rows of each query, [P]."""
        most = max(self.counts_Q.tolist(), default=0)
        places = (self.query_P, self.place_P)
        grid_QM = scores_P.new_full((len(self.counts_Q), most), -torch.inf).index_put(places, scores_P)
        return grid_QM.log_softmax(1)[places]


class RankingTerm(OutputTerm):
    """Base of losses of a query."""

    @abstractmethod
    def of_queries(self, student_P: Tensor, teacher_P: Tensor, relevance_P: Tensor, groups: Groups) -> Tensor:
        """Return the loss of each query, [Q]; scores are in float32 at least, ``relevance_P`` NaN where unknown."""

    def incompatibility(self, context: TeacherContext) -> str | None:
        """Return why the term makes no sense with such a cache and what to do instead; None if it does."""
        if context.outputs is not None and context.outputs.width > 1:
            return (
                f"it compares the scores of a query's documents, one for each, and the outputs are "
                f"{context.outputs.width} wide; use a cache of task ranking, or another term"
            )
        return super().incompatibility(context)

    def compare(self, outputs: Outputs) -> Tensor:
        """Return at each row the loss of its query, [P]."""
        groups = Groups.of(outputs.groups_P)
        values_Q = self.of_queries(outputs.student_PC[:, 0], outputs.teacher_PC[:, 0], outputs.labels_P, groups)
        return values_Q[groups.query_P]


class MarginMSE(RankingTerm):
    """Mean, over all pairs of a query's documents, of the squared difference of the student's and the teacher's margin.

    A margin is the score of one document minus that of another (Hofstätter et al. 2020, arXiv 2010.02666, of a relevant
    and another document; here of any two), so student and teacher may differ by a number that depends on the query.
    """

    def of_queries(self, student_P: Tensor, teacher_P: Tensor, relevance_P: Tensor, groups: Groups) -> Tensor:
        """Return the loss of each query, [Q]."""
        errors_P = student_P - teacher_P
        # With e the errors, the sum over pairs of (e_i - e_j)^2 is n times the sum of (e_i - mean)^2, without any pair.
        centred_P = errors_P - groups.mean(errors_P)[groups.query_P]
        return 2 * groups.sum(centred_P.square()) / (groups.counts_Q - 1).clamp(min=1)


class ListwiseKL(RankingTerm):
    """KL of teacher and student over a query's documents, T^2 x KL(softmax(t / T) || softmax(s / T)), in nats.

    The teacher's half of ListNet (Cao et al. 2007) with a ``temperature`` for both.
    """

    temperature: Temperature = 1.0

    def of_queries(self, student_P: Tensor, teacher_P: Tensor, relevance_P: Tensor, groups: Groups) -> Tensor:
        """Return the loss of each query, [Q]."""
        log_s_P, log_t_P = (groups.log_softmax(scores_P / self.temperature) for scores_P in (student_P, teacher_P))
        return self.temperature**2 * groups.sum(log_t_P.exp() * (log_t_P - log_s_P))


class ListCrossEntropy(RankingTerm):
    """Cross-entropy of the student's softmax over a query's documents and the corpus's own relevance.

    Relevant documents share the mass in proportion to their relevance. A query without a relevant document, or without
    any judgement, has 0. The teacher plays no part: it is the loss that a ranker is trained on without distillation.
    """

    needs = "the corpus's relevance of documents"
    uses_teacher = False

    def of_queries(self, student_P: Tensor, teacher_P: Tensor, relevance_P: Tensor, groups: Groups) -> Tensor:
        """Return the loss of each query, [Q]."""
        gains_P = relevance_P.nan_to_num().clamp(min=0)
        total_Q = groups.sum(gains_P)
        losses_Q = -groups.sum(gains_P * groups.log_softmax(student_P))
        return losses_Q / torch.where(total_Q > 0, total_Q, 1)
