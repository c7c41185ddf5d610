"""Terms over raw outputs: scores of a regressor or ranker, logits of classes before softmax, embeddings.

None of them has parameters: if student and teacher differ in width, the student has a projection of its own, which is
saved with the student.

- Per position: `OutputMSE`, `OutputCosine`, `LabelMSE`.
- Embeddings: `SimilarityMatrix` matches the cosines between all texts of a micro-batch to the teacher's, for any two
  widths. `Contrastive` and `LabelCosine` use no teacher: they train a student without distillation, or in addition to
  it. The texts of a pair are the two positions of one sequence (`Outputs.groups_P`), which is never split over
  micro-batches; both positions get the value of the pair, and texts without a pair get 0. All values are computed from
  cosines, so lengths do not matter. `SimilarityMatrix` and `Contrastive` depend on the micro-batch: a larger
  ``batch_sequences`` changes them, ``gradient_accumulation`` does not.
- Rankings: `MarginMSE`, `ListwiseKL`, `ListCrossEntropy` are losses of a query, whose positions are its documents;
  every position gets the value of its query. The mean over positions in the objective thus weights a query by its
  number of documents, so weights mean the same for short and long lists. A query with one document has value 0. Queries
  are padded to a grid [Q, M] for the softmax over documents; no query is split, since its documents are one sequence.

Shape suffixes: P flat positions, C outputs of a position, Q pairs or queries, M most documents of a query.
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
    """Base class of terms over raw outputs, which have no parameters."""

    needs = "the teacher's raw outputs"
    same_width: ClassVar[bool] = False
    """Whether the outputs of student and teacher must have equal width."""

    @abstractmethod
    def compare(self, outputs: Outputs) -> Tensor:
        """Return the value at each position, [P]; outputs are float32 or float64."""

    def incompatibility(self, context: TeacherContext) -> str | None:
        """Return why the term cannot be used with such a cache, and what to do instead; None if it can."""
        if context.has("outputs"):
            return None
        return f"it needs {self.needs}, and the cache holds {context.holds}; caches of tasks about tokens have none"

    def build(self, context: TeacherContext, student_widths: Sequence[int], generator: torch.Generator) -> TermModule:
        """Return the module, which has no parameters."""
        return OutputModule(self)


class OutputModule(TermModule):
    """A term over outputs as a module."""

    needs = Needs(outputs=True)

    def __init__(self, term: OutputTerm) -> None:
        super().__init__()
        self._term = term

    def forward(self, states: LayerStates) -> Tensor:
        """Return the value at each position, [P]."""
        outputs = states.outputs
        assert outputs is not None
        student_PC = at_least_float32(outputs.student_PC)
        return self._term.compare(outputs.with_student(student_PC))

    def describe(self) -> dict[str, object]:
        """Return an empty record: there are no choices."""
        return {}


class OutputMSE(OutputTerm):
    """Mean squared error of the outputs, the mean over the width."""

    same_width: ClassVar[bool] = True

    def compare(self, outputs: Outputs) -> Tensor:
        """Return the error at each position, [P]."""
        return (outputs.student_PC - outputs.teacher_PC).square().mean(1)


class OutputCosine(OutputTerm):
    """1 - cosine of the outputs; lengths are ignored."""

    same_width: ClassVar[bool] = True

    def compare(self, outputs: Outputs) -> Tensor:
        """Return the distance at each position, [P]."""
        return 1 - nn.functional.cosine_similarity(outputs.student_PC, outputs.teacher_PC, dim=1)


class LabelMSE(OutputTerm):
    """Squared error of the student's score and the label; 0 where there is no label.

    It does not use the teacher: a regressor without distillation is trained on it.
    """

    needs = "the corpus's labels, which are numbers"
    uses_teacher = False

    def incompatibility(self, context: TeacherContext) -> str | None:
        """Return why the term cannot be used with such a cache, and what to do instead; None if it can."""
        if context.outputs is not None and context.outputs.width > 1:
            return f"it compares one score with one number, and the outputs are {context.outputs.width} wide"
        return super().incompatibility(context)

    def compare(self, outputs: Outputs) -> Tensor:
        """Return the error at each position, [P]."""
        labels_P = outputs.labels_P
        errors_P = (outputs.student_PC[:, 0] - labels_P.nan_to_num()).square()
        return torch.where(labels_P.isnan(), 0.0, errors_P)


def pairs_of(groups_P: Tensor) -> tuple[Tensor, Tensor]:
    """Return the positions of the first and of the second text of every pair, [Q] each."""
    first_Q = (groups_P[1:] == groups_P[:-1]).nonzero().squeeze(1)
    return first_Q, first_Q + 1


def _unit(vectors_PC: Tensor) -> Tensor:
    return nn.functional.normalize(vectors_PC, dim=1)


class EmbeddingTerm(OutputTerm):
    """Base class of terms that compare embeddings with each other."""

    def incompatibility(self, context: TeacherContext) -> str | None:
        """Return why the term cannot be used with such a cache, and what to do instead; None if it can."""
        if context.outputs is not None and context.outputs.pooling is None:
            return "it compares embeddings, and the outputs of this cache are none; use a cache of task embedding"
        return super().incompatibility(context)


class SimilarityMatrix(EmbeddingTerm):
    """Mean squared error of the cosines of a text with all other texts of the micro-batch; 0 if there are none.

    Student and teacher may differ in width.
    """

    def compare(self, outputs: Outputs) -> Tensor:
        """Return the error at each position, [P]."""
        student_PC, teacher_PC = _unit(outputs.student_PC), _unit(outputs.teacher_PC)
        errors_PP = (student_PC @ student_PC.T - teacher_PC @ teacher_PC.T).square()
        # The cosine of a text with itself is 1 in both models.
        others_PP = 1 - torch.eye(len(errors_PP), dtype=errors_PP.dtype, device=errors_PP.device)
        return (errors_PP * others_PP).sum(1) / max(len(errors_PP) - 1, 1)


class PairTerm(EmbeddingTerm):
    """Base class of terms over pairs of texts, which do not use the teacher."""

    needs = "the corpus's pairs of texts"
    uses_teacher = False
    needs_pairs = True


class Contrastive(PairTerm):
    """Cross-entropy of scaled cosines: find the second text of a pair among those of all pairs of the micro-batch.

    Pairs without a label are positive. Labelled pairs are positive if their label is at least ``min_label`` (default:
    none is). All others are ignored.

    Source: van den Oord et al., "Representation Learning with Contrastive Predictive Coding", 2018 (InfoNCE);
    Henderson et al., "Efficient Natural Language Response Suggestion for Smart Reply", 2017 (in-batch negatives).
    """

    scale: float = Field(default=20.0, gt=0, allow_inf_nan=False)
    """Factor of the cosines; 1 / scale is the temperature."""
    min_label: float | None = Field(default=None, allow_inf_nan=False)

    def compare(self, outputs: Outputs) -> Tensor:
        """Return the loss of each position's pair, [P]."""
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

    The label ``label_scale`` stands for a cosine of 1, so use 5 for labels from 0 to 5.
    """

    label_scale: float = Field(default=1.0, gt=0, allow_inf_nan=False)

    def compare(self, outputs: Outputs) -> Tensor:
        """Return the error of each position's pair, [P]."""
        first_Q, second_Q = pairs_of(outputs.groups_P)
        known_Q = ~outputs.labels_P[first_Q].isnan()
        first_Q, second_Q = first_Q[known_Q], second_Q[known_Q]
        cosine_Q = nn.functional.cosine_similarity(outputs.student_PC[first_Q], outputs.student_PC[second_Q], dim=1)
        errors_Q = (cosine_Q - outputs.labels_P[first_Q] / self.label_scale).square()
        return _at_pairs(errors_Q, first_Q, second_Q, outputs)


def _at_pairs(values_Q: Tensor, first_Q: Tensor, second_Q: Tensor, outputs: Outputs) -> Tensor:
    """Return the value of each pair at both of its positions, and 0 at all others, [P]."""
    zeros_P = outputs.student_PC.new_zeros(len(outputs.student_PC))
    return zeros_P.index_put((torch.cat([first_Q, second_Q]),), torch.cat([values_Q, values_Q]))


@dataclass(frozen=True)
class Groups:
    """The query of every position, [P], the documents of each query, [Q], and a position's index among them."""

    query_P: Tensor
    counts_Q: Tensor
    index_P: Tensor

    @classmethod
    def of(cls, groups_P: Tensor) -> Groups:
        """Return the groups of adjacent positions with the same number."""
        _, query_P, counts_Q = groups_P.unique_consecutive(return_inverse=True, return_counts=True)
        starts_Q = counts_Q.cumsum(0) - counts_Q
        return cls(query_P, counts_Q, torch.arange(len(groups_P), device=groups_P.device) - starts_Q[query_P])

    def sum(self, values_P: Tensor) -> Tensor:
        """Return the sum over the documents of each query, [Q]."""
        return values_P.new_zeros(len(self.counts_Q)).index_add(0, self.query_P, values_P)

    def mean(self, values_P: Tensor) -> Tensor:
        """Return the mean over the documents of each query, [Q]."""
        return self.sum(values_P) / self.counts_Q

    def log_softmax(self, scores_P: Tensor) -> Tensor:
        """Return the log-softmax over the documents of each query, [P]."""
        most = max(self.counts_Q.tolist(), default=0)
        cells = (self.query_P, self.index_P)
        grid_QM = scores_P.new_full((len(self.counts_Q), most), -torch.inf).index_put(cells, scores_P)
        return grid_QM.log_softmax(1)[cells]


class RankingTerm(OutputTerm):
    """Base class of losses of a query."""

    @abstractmethod
    def of_queries(self, student_P: Tensor, teacher_P: Tensor, relevance_P: Tensor, groups: Groups) -> Tensor:
        """Return the loss of each query, [Q]; scores are float32 or float64, ``relevance_P`` is NaN where unknown."""

    def incompatibility(self, context: TeacherContext) -> str | None:
        """Return why the term cannot be used with such a cache, and what to do instead; None if it can."""
        if context.outputs is not None and context.outputs.width > 1:
            return (
                f"it compares the scores of a query's documents, one for each, and the outputs are "
                f"{context.outputs.width} wide; use a cache of task ranking, or another term"
            )
        return super().incompatibility(context)

    def compare(self, outputs: Outputs) -> Tensor:
        """Return the loss of each position's query, [P]."""
        groups = Groups.of(outputs.groups_P)
        values_Q = self.of_queries(outputs.student_PC[:, 0], outputs.teacher_PC[:, 0], outputs.labels_P, groups)
        return values_Q[groups.query_P]


class MarginMSE(RankingTerm):
    """Mean squared difference of the margins of student and teacher, over all pairs of a query's documents.

    A margin is the score of one document minus that of another (Hofstätter et al. 2020, arXiv 2010.02666, for a
    relevant and another document; here for any two), so scores may differ by a constant per query.
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
    """Cross-entropy of the student's softmax over a query's documents to the relevance in the corpus.

    The target mass of a document is proportional to its relevance. A query without a relevant document has value 0. It
    does not use the teacher: a ranker without distillation is trained on it.
    """

    needs = "the corpus's relevance of documents"
    uses_teacher = False

    def of_queries(self, student_P: Tensor, teacher_P: Tensor, relevance_P: Tensor, groups: Groups) -> Tensor:
        """Return the loss of each query, [Q]."""
        gains_P = relevance_P.nan_to_num().clamp(min=0)
        total_Q = groups.sum(gains_P)
        losses_Q = -groups.sum(gains_P * groups.log_softmax(student_P))
        return losses_Q / torch.where(total_Q > 0, total_Q, 1)
