"""Terms that compare embeddings with each other, against the same maths written pair by pair."""

from __future__ import annotations

import math

import pytest
import torch

from kdcache.config import build
from kdcache.errors import ConfigError
from kdcache.losses import LayerStates, Objective, ObjectiveConfig, TeacherContext, TeacherRows
from kdcache.losses.base import Outputs
from kdcache.losses.outputs import Contrastive, LabelCosine, SimilarityMatrix
from kdcache.models.lm_head import LMHead
from kdcache.schema import OutputsRecord
from tests.loops import loop

NAN = math.nan
#: Rows 0 and 1 are a pair, 2 is alone, 3 and 4, 5 and 6, 7 and 8 are pairs.
GROUPS = torch.tensor([0, 0, 1, 2, 2, 3, 3, 4, 4])
LABELS = torch.tensor([NAN, NAN, NAN, 4.0, 4.0, NAN, NAN, 1.0, 1.0], dtype=torch.float64)
EMBEDDINGS = TeacherContext(kind="outputs", outputs=OutputsRecord(width=6, pooling="mean", normalised=True))


def outputs(student_width: int = 4, seed: int = 0) -> Outputs:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(9, w, generator=generator, dtype=torch.float64) for w in (student_width, 6))
    return Outputs(student.requires_grad_(), teacher, LABELS, GROUPS)


def cosine(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    return first @ second / (first.norm() * second.norm())


def test_similarity_matrix_is_the_mean_over_the_other_texts():
    given = outputs()
    values = SimilarityMatrix(weight=1.0).compare(given)
    for row in range(9):
        errors = [
            (cosine(given.student_PC[row], given.student_PC[n]) - cosine(given.teacher_PC[row], given.teacher_PC[n]))
            ** 2
            for n in range(9)
            if n != row
        ]
        torch.testing.assert_close(values[row], sum(errors) / 8)


def test_similarity_matrix_knows_no_scale_and_no_rotation_of_the_student():
    given = outputs(student_width=6)
    rotation = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0]
    same = Outputs(3 * given.teacher_PC @ rotation, given.teacher_PC, LABELS, GROUPS)
    assert SimilarityMatrix(weight=1.0).compare(same).abs().max() < 1e-20


@loop("count", [0, 1])
def test_a_text_alone_has_nothing_to_be_compared_with(count):
    given = outputs().each(lambda tensor: tensor[:count])
    for term in (SimilarityMatrix(weight=1.0), Contrastive(weight=1.0), LabelCosine(weight=1.0)):
        values = term.compare(given)
        assert values.shape == (count,)
        assert not values.any()


@loop(
    ("settings", "pairs"),
    [
        ({}, [(0, 1), (5, 6)]),
        ({"scale": 7.0, "min_label": 3.5}, [(0, 1), (3, 4), (5, 6)]),
        ({"min_label": 1.0}, [(0, 1), (3, 4), (5, 6), (7, 8)]),
    ],
)
def test_contrastive_finds_the_second_text_among_those_of_the_pairs_that_belong_together(settings, pairs):
    given = outputs()
    values = Contrastive(weight=1.0, **settings).compare(given)
    expected = torch.zeros(9, dtype=torch.float64)
    for first, second in pairs:
        scores = [settings.get("scale", 20.0) * cosine(given.student_PC[first], given.student_PC[n]) for _, n in pairs]
        loss = torch.logsumexp(torch.stack(scores), 0) - scores[pairs.index((first, second))]
        expected[first] = expected[second] = loss
    torch.testing.assert_close(values, expected)


def test_label_cosine_is_the_error_of_the_labelled_pairs():
    given = outputs()
    values = LabelCosine(weight=1.0, label_scale=5.0).compare(given)
    expected = torch.zeros(9, dtype=torch.float64)
    for first, second, label in ((3, 4, 0.8), (7, 8, 0.2)):
        expected[first] = expected[second] = (cosine(given.student_PC[first], given.student_PC[second]) - label) ** 2
    torch.testing.assert_close(values, expected)


@loop("term", [SimilarityMatrix(weight=1.0), Contrastive(weight=1.0), LabelCosine(weight=1.0)])
def test_gradients_are_those_of_the_value(term):
    given = outputs()
    assert torch.autograd.gradcheck(lambda student: term.compare(given.with_student(student)), (given.student_PC,))


def test_a_row_that_does_not_count_takes_its_pair_with_it():
    given = outputs()
    config = build(ObjectiveConfig, {"contrastive": {"weight": 1.0}})
    objective = Objective(config, context=EMBEDDINGS)
    objective.build_terms((), seed=0)
    mask = torch.ones(9, dtype=torch.bool)
    mask[6] = False
    nothing = torch.zeros(9, 0)
    rows = TeacherRows(
        ids_PK=nothing.long(),
        logprobs_PK=nothing,
        log_tail_P=torch.zeros(9),
        entropy_P=torch.zeros(9),
        labels_P=torch.full((9,), -1),
        loss_mask_P=mask,
    )
    result = objective(given.student_PC, LMHead(torch.eye(4).double()), rows, 8, LayerStates({}, {}, given))
    # The pair that is left is the only candidate of itself.
    assert result.loss.abs() < 1e-12


def test_numbers_that_are_no_embeddings_are_refused():
    context = TeacherContext(kind="outputs", outputs=OutputsRecord(width=1))
    for name in ("similarity_matrix", "contrastive", "label_cosine"):
        with pytest.raises(ConfigError, match=rf"{name}: it compares embeddings, .* use a cache of task embedding"):
            Objective(build(ObjectiveConfig, {name: {"weight": 1.0}}), context=context)
