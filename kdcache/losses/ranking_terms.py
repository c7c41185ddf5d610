"""Terms over the documents of one query: what counts is how they compare with each other, not each score by itself.

The rows of a query are a group (`Outputs.groups_P`). All terms here are losses of a query, and the value at each of its
rows is that of the query. So the mean over rows, which the objective makes, weighs a query by its documents, weights
mean the same for short and long lists, and a query with one document, which cannot be put in any order, has 0.

Groups are padded to a grid [Q, M] where a softmax wants them side by side; no query is ever split, as its documents are
one sequence of the cache. Shape suffixes: P flat rows, C outputs of a row (here 1), Q queries, M most documents.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from kdcache.losses.context import TeacherContext
from kdcache.losses.output_terms import OutputTerm
from kdcache.losses.schedules import Temperature
from kdcache.losses.terms import Outputs


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

    def refusal(self, context: TeacherContext) -> str | None:
        """Return why the term makes no sense with such a cache and what to do instead; None if it does."""
        if context.outputs is not None and context.outputs.width > 1:
            return (
                f"it compares the scores of a query's documents, one for each, and the outputs are "
                f"{context.outputs.width} wide; use a cache of task ranking, or another term"
            )
        return super().refusal(context)

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

    needs = "nothing: the corpus's own relevance"
    uses_teacher = False

    def of_queries(self, student_P: Tensor, teacher_P: Tensor, relevance_P: Tensor, groups: Groups) -> Tensor:
        """Return the loss of each query, [Q]."""
        gains_P = relevance_P.nan_to_num().clamp(min=0)
        total_Q = groups.sum(gains_P)
        losses_Q = -groups.sum(gains_P * groups.log_softmax(student_P))
        return losses_Q / torch.where(total_Q > 0, total_Q, 1)
