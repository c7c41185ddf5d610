"""Terms over the documents of a query against the same maths, one query at a time, in float64."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor

from kdcache.config import build
from kdcache.errors import ConfigError
from kdcache.losses import TERMS, LayerStates, Objective, ObjectiveConfig, Outputs, TeacherContext, TeacherRows
from kdcache.models.bodies import identity_head
from kdcache.schema import OutputsRecord
from tests.loops import loop

CONTEXT = TeacherContext(kind="outputs", outputs=OutputsRecord(width=1))
#: Documents of each query, and what the corpus says of them (None: nothing).
RELEVANCE: list[list[float | None]] = [[0, 1, 0, 0], [1], [1, 1, 0], [0, 0], [None, 2, 1, None, 0], [None, None], [0]]
SETTINGS: dict[str, dict[str, Any]] = {
    "margin_mse": {},
    "listwise_kl": {},
    "listwise_kl at 2.5": {"temperature": 2.5},
    "list_cross_entropy": {},
}


def name_of(case: str) -> str:
    return case.split()[0]


def outputs(relevance: list[list[float | None]] = RELEVANCE, dtype: torch.dtype = torch.float64) -> Outputs:
    """Scores of all documents of ``relevance``, those of the student as leaf."""
    random = torch.Generator().manual_seed(5)
    counts = torch.tensor([len(query) for query in relevance])
    labels = [float("nan") if value is None else float(value) for query in relevance for value in query]
    student, teacher = (3 * torch.randn(len(labels), 1, generator=random, dtype=torch.float64) for _ in "st")
    groups = torch.arange(len(counts)).repeat_interleave(counts)
    return Outputs(student.to(dtype).requires_grad_(), teacher.float(), torch.tensor(labels), groups)


def objective_of(case: str, weight: float = 0.7) -> Objective:
    config = build(ObjectiveConfig, {name_of(case): {"weight": weight, **SETTINGS[case]}})
    objective = Objective(config, context=CONTEXT)
    objective.build_terms((), seed=0)
    return objective


def values(case: str, found: Outputs) -> Tensor:
    return objective_of(case).terms[name_of(case)](LayerStates({}, {}, found))


def oracle(case: str, student: Tensor, teacher: Tensor, relevance: list[float | None]) -> Tensor:
    """The loss of one query: a loop over pairs of documents, or plain probabilities."""
    if name_of(case) == "margin_mse":
        pairs = list(combinations(range(len(student)), 2))
        errors = [((student[i] - student[j]) - (teacher[i] - teacher[j])) ** 2 for i, j in pairs]
        return sum(errors, 0 * student.sum()) / max(len(pairs), 1)
    if name_of(case) == "listwise_kl":
        temperature = SETTINGS[case].get("temperature", 1.0)
        p, q = ((scores / temperature).exp() / (scores / temperature).exp().sum() for scores in (teacher, student))
        return temperature**2 * (p * (p / q).log()).sum()
    gains = torch.tensor([value or 0.0 for value in relevance], dtype=torch.float64)
    if gains.sum() == 0:
        return 0 * student.sum()
    return -(gains / gains.sum() * (student.exp() / student.exp().sum()).log()).sum()


def oracle_rows(case: str, found: Outputs, relevance: list[list[float | None]] = RELEVANCE) -> Tensor:
    rows, start = [], 0
    for query in relevance:
        span = slice(start, start + len(query))
        start += len(query)
        loss = oracle(case, found.student_PC[span, 0], found.teacher_PC[span, 0].double(), query)
        rows += [loss] * len(query)
    return torch.stack(rows)


@loop("case", SETTINGS)
def test_every_row_has_the_loss_of_its_query(case: str) -> None:
    found = outputs()
    torch.testing.assert_close(values(case, found), oracle_rows(case, found), rtol=1e-9, atol=1e-12)


@loop("case", SETTINGS)
def test_gradients_are_those_of_the_plain_loop(case: str) -> None:
    found = outputs()
    weights = torch.linspace(0.5, 2, len(found.groups_P), dtype=torch.float64)
    mine, plain = (
        torch.autograd.grad((weights * rows).sum(), found.student_PC)[0]
        for rows in (values(case, found), oracle_rows(case, found))
    )
    assert plain.abs().max() > 0.1
    torch.testing.assert_close(mine, plain, rtol=1e-9, atol=1e-12)


@loop("case", SETTINGS)
@loop("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_is_raised_to_float32(case: str, dtype: torch.dtype) -> None:
    found = outputs(dtype=dtype)
    rows = values(case, found)
    assert rows.dtype == torch.float32
    exact = oracle_rows(case, Outputs(found.student_PC.double(), *(getattr(found, f"{n}_P{c}") for n, c in _REST)))
    torch.testing.assert_close(rows.double(), exact, rtol=1e-5, atol=1e-5)


_REST = (("teacher", "C"), ("labels", ""), ("groups", ""))


@loop("case", SETTINGS)
def test_a_query_with_one_document_has_no_loss(case: str) -> None:
    found = outputs([[1], [0], [None]])
    rows = values(case, found)
    assert rows.tolist() == [0, 0, 0]
    (gradient,) = torch.autograd.grad(rows.sum(), found.student_PC)
    assert gradient.tolist() == [[0], [0], [0]]


@loop("case", SETTINGS)
def test_no_rows_have_no_loss(case: str) -> None:
    found = outputs().each(lambda tensor: tensor[:0])
    assert values(case, found).shape == (0,)


@loop("case", SETTINGS)
def test_splitting_a_batch_by_whole_queries_changes_nothing(case: str) -> None:
    found = outputs()
    whole = values(case, found)
    parts = [found.groups_P < 2, (found.groups_P >= 2) & (found.groups_P < 5), found.groups_P >= 5]
    split = [values(case, found.each(lambda tensor, part=part: tensor[part])) for part in parts]
    torch.testing.assert_close(torch.cat(split), whole, rtol=1e-12, atol=1e-14)


def test_the_objective_takes_the_mean_over_documents() -> None:
    found = outputs()
    objective, num_rows = objective_of("margin_mse", weight=0.5), len(found.groups_P)
    nothing = torch.zeros(num_rows, 0)
    rows = TeacherRows(
        ids_PK=nothing.long(),
        logprobs_PK=nothing,
        log_tail_P=torch.zeros(num_rows),
        gold_logprob_P=torch.zeros(num_rows),
        labels_P=torch.full((num_rows,), -1),
        loss_mask_P=torch.ones(num_rows, dtype=torch.bool),
        entropy_P=torch.zeros(num_rows),
    )
    states = LayerStates({}, {}, found)
    result = objective(found.student_PC, identity_head(1, found.student_PC), rows, num_rows, states)
    torch.testing.assert_close(result.loss, 0.5 * oracle_rows("margin_mse", found).mean(), rtol=1e-9, atol=0)


def test_margins_do_not_see_what_all_documents_of_a_query_share() -> None:
    found = outputs()
    shifted = found.with_student(found.student_PC + 100.0 * found.groups_P[:, None])
    for case in SETTINGS:
        torch.testing.assert_close(values(case, shifted), values(case, found), rtol=1e-9, atol=1e-9)


def test_the_student_that_is_the_teacher_has_no_loss() -> None:
    found = outputs()
    same = found.with_student(found.teacher_PC.double() + 3)
    for case in ("margin_mse", "listwise_kl", "listwise_kl at 2.5"):
        torch.testing.assert_close(values(case, same), torch.zeros(len(found.groups_P), dtype=torch.float64))


def test_extreme_scores_give_finite_losses() -> None:
    found = outputs(dtype=torch.float32)
    far = found.with_student((1e4 * found.student_PC).detach().requires_grad_())
    for case in SETTINGS:
        (gradient,) = torch.autograd.grad(values(case, far).sum(), far.student_PC)
        assert gradient.isfinite().all()


@loop("name", ["margin_mse", "listwise_kl", "list_cross_entropy"])
def test_vectors_and_distributions_have_no_rankings(name: str) -> None:
    term = TERMS[name](weight=1)
    wide = TeacherContext(kind="outputs", outputs=OutputsRecord(width=3, pooling="mean", normalised=True))
    with pytest.raises(ConfigError, match=f"{name}: .*3 wide; use a cache of task ranking"):
        term.check(wide, name)
    with pytest.raises(ConfigError, match=f"{name}: it needs .*top-k"):
        term.check(TeacherContext(), name)
    term.check(CONTEXT, name)


def test_a_temperature_of_0_is_refused() -> None:
    with pytest.raises(ConfigError, match="temperature"):
        build(ObjectiveConfig, {"listwise_kl": {"weight": 1, "temperature": 0}})
