from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from kdcache.errors import StudentError
from kdcache.losses import (
    CrossEntropy,
    ForwardKL,
    Objective,
    ObjectiveConfig,
    TeacherContext,
    TeacherRows,
    per_position_values,
    score_positions,
)
from kdcache.models.lm_head import LMHead
from kdcache.schema import SequenceBatch, Targets
from tests import causal as causal_lm
from tests.loops import loop
from tests.losses.oracle import dense_logits, dense_values, make_case

LOSSES_ASKED = {"kl": ForwardKL(weight=1.0), "tempered": ForwardKL(weight=0.0, temperature=2.0)}


@loop("chunk", [1, 4, 13, None])
@loop("top_k", [6, 31])
def test_scores_equal_the_dense_ones_at_every_position(chunk, top_k):
    case = make_case(top_k=top_k, softcap=4.0)
    found = score_positions(case.hidden_PD, case.head, case.rows, LOSSES_ASKED, chunk_positions=chunk)
    logprobs_PV = dense_logits(case).detach().log_softmax(1)
    for name, loss in LOSSES_ASKED.items():
        torch.testing.assert_close(found.losses[name], dense_values(case, loss).detach())
    gold_P = logprobs_PV.gather(1, case.rows.labels_P[:, None]).squeeze(1)
    torch.testing.assert_close(found.gold_logprob_P, gold_P)
    assert torch.equal(found.top1_ids_P, logprobs_PV.argmax(1))
    torch.testing.assert_close(found.top1_prob_P, logprobs_PV.max(1).values.exp())
    assert not any(value.requires_grad for value in found.losses.values())


def test_the_teachers_favourite_comes_from_the_best_there_is():
    case = make_case(masked=False)
    favourites_P = case.teacher_logits_PV.argmax(1)

    def top1(context: TeacherContext, rows: TeacherRows = case.rows) -> torch.Tensor:
        return score_positions(case.hidden_PD, case.head, rows, {}, chunk_positions=4, context=context).teacher_top1_P

    assert torch.equal(top1(TeacherContext()), favourites_P)
    # Stored states are rounded, and their logits may put another id first than the teacher did; the kept id is exact.
    rounded = replace(case.rows, hidden_PD=case.teacher_logits_PV.flip(1))
    head = LMHead(torch.eye(31, dtype=torch.float64))
    assert torch.equal(top1(TeacherContext("hidden", head=head), rounded), favourites_P)
    # Samples come in any order; a tail draw may seem more probable than a kept id.
    flipped = replace(case.rows, ids_PK=case.rows.ids_PK.flip(1), logprobs_PK=case.rows.logprobs_PK.flip(1))
    assert torch.equal(top1(TeacherContext("sampled"), flipped), favourites_P)
    assert torch.equal(top1(TeacherContext("hybrid"), flipped), flipped.ids_PK[:, 0])


def test_scores_of_an_objective_know_its_context():
    case = make_case()
    config = ObjectiveConfig(forward_kl=ForwardKL(weight=1.0, mode="full"))
    objective = Objective(config, context=case.context_for(config))
    values = per_position_values(case.hidden_PD, case.head, case.rows, objective)
    torch.testing.assert_close(values["forward_kl"], dense_values(case, config.forward_kl).detach())


def test_values_of_an_objective_add_up_to_its_sums():
    case = make_case()
    objective = Objective(ObjectiveConfig(cross_entropy=CrossEntropy(weight=2.0)), chunk_positions=3)
    values = per_position_values(case.hidden_PD, case.head, case.rows, objective)
    sums = objective(case.hidden_PD, case.head, case.rows, 1).sums
    assert list(values) == ["cross_entropy"]
    torch.testing.assert_close(values["cross_entropy"][case.rows.loss_mask_P].sum(), sums["cross_entropy"])


def test_bfloat16_students_and_autocast_are_scored_in_float32():
    case = make_case(num_positions=50)
    exact = score_positions(case.hidden_PD, case.head, case.rows, LOSSES_ASKED)
    half = case.to(torch.bfloat16)
    plain = score_positions(half.hidden_PD, half.head, half.rows, LOSSES_ASKED)
    single = case.to(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = score_positions(single.hidden_PD, single.head, single.rows, LOSSES_ASKED)
    for scores in (plain, cast):
        assert scores.gold_logprob_P.dtype == torch.float32
        torch.testing.assert_close(scores.gold_logprob_P.double(), exact.gold_logprob_P, rtol=0.02, atol=0.05)


def test_empty_batches_and_mistakes():
    case = make_case(num_positions=0)
    assert score_positions(case.hidden_PD, case.head, case.rows, LOSSES_ASKED).top1_ids_P.shape == (0,)
    case = make_case()
    with pytest.raises(StudentError, match="share one tokenizer"):
        score_positions(case.hidden_PD, case.head.narrow(9), case.rows, LOSSES_ASKED)
    with pytest.raises(StudentError, match="12 rows for 13 hidden states"):
        score_positions(case.hidden_PD, case.head, case.rows.slice(0, 12), LOSSES_ASKED)


def test_rows_come_out_of_the_tasks_collator():
    case = make_case(num_positions=5, top_k=3, masked=False)
    rows = case.rows
    targets = Targets(
        rows.ids_PK.numpy(),
        rows.logprobs_PK.float().numpy(),
        rows.log_tail_P.float().numpy(),
        np.zeros(5, np.float32),
        rows.entropy_P.float().numpy(),
    )
    tokens_T = np.array([1, 2, 3, 4, 5, 6, 7], np.uint32)  # two sequences of 3 and 4 tokens: 2 + 3 positions
    mask_P = np.array([1, 0, 1, 1, 1], np.uint8)
    batch = SequenceBatch([0, 1], tokens_T, np.array([0, 3, 7]), np.array([0, 2, 5]), mask_P, {"targets": targets})
    collated = {name: torch.from_numpy(value) for name, value in causal_lm.collate(batch, pad_id=0).items()}
    found = TeacherRows.from_batch(collated).to("cpu")
    assert found.labels_P.tolist() == [2, 3, 5, 6, 7]
    assert found.loss_mask_P.tolist() == [True, False, True, True, True]
    student = replace(case, rows=found).to(torch.float32)
    loss = Objective()(student.hidden_PD, student.head, found, 4)
    assert loss.num_valid == 4
    assert torch.isfinite(loss.loss.detach())
