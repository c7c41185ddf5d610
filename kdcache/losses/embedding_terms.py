"""Terms over embeddings that compare texts with each other: all of a micro-batch, or the two of a pair.

Embeddings are for comparison, so what a student has to get right is which texts are alike. `similarity_matrix` learns
that from the teacher, whatever the two widths. The other two know no teacher: they are what a student is trained on
without distillation, or beside it.

The texts of a pair are the two rows of one sequence (`Outputs.groups_P`), which no micro-batch separates. A value of a
pair stands at both of its rows, and rows without a pair have 0. Everything is computed from cosines, so lengths play no
part. `similarity_matrix` and `contrastive` depend on which texts share a micro-batch: a larger ``batch_sequences``
changes them, unlike ``gradient_accumulation``.

Shape suffixes: P rows, Q pairs, C width of the embeddings.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from kdcache.losses.context import TeacherContext
from kdcache.losses.output_terms import OutputTerm
from kdcache.losses.terms import Outputs


def pairs_of(groups_P: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows of the first and of the second text of every pair, [Q] each."""
    first_Q = (groups_P[1:] == groups_P[:-1]).nonzero().squeeze(1)
    return first_Q, first_Q + 1


def _unit(vectors_PC: Tensor) -> Tensor:
    return nn.functional.normalize(vectors_PC, dim=1)


class EmbeddingTerm(OutputTerm):
    """Base of terms that compare embeddings with each other."""

    def refusal(self, context: TeacherContext) -> str | None:
        """Return why the term makes no sense with such a cache and what to do instead; None if it does."""
        if context.outputs is not None and context.outputs.pooling is None:
            return "it compares embeddings, and the outputs of this cache are none; use a cache of task embedding"
        return super().refusal(context)


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

    needs = "nothing: the corpus's own pairs"
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
