from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor

import kdcache.losses.objective as objective_module
from kdcache.config import Config, build, load
from kdcache.errors import ConfigError
from kdcache.losses import (
    MEASURES,
    Objective,
    ObjectiveConfig,
    Select,
    TeacherContext,
    TeacherRows,
    incompatibility,
    per_position_values,
)
from kdcache.losses.kernel import Work, weighted_sum
from kdcache.models.lm_head import LMHead
from kdcache.schema import Kind
from tests.loops import loop
from tests.losses.oracle import Case, dense_values, make_case


def measured(case: Case) -> dict[str, Tensor]:
    """The three measures, from the teacher's whole logits."""
    logprobs_PV = case.teacher_logits_PV.log_softmax(1)
    return {
        "teacher_entropy": -(logprobs_PV.exp() * logprobs_PV).sum(1),
        "teacher_loss": -logprobs_PV[torch.arange(len(logprobs_PV)), case.rows.labels_P],
        "confidence": logprobs_PV.exp().amax(1),
    }


CASE = make_case(num_positions=40, seed=3)
RANGES = {
    by: {"by": by, "min": float(values_P.quantile(0.3)), "max": float(values_P.quantile(0.8))}
    for by, values_P in measured(CASE).items()
}


def chosen(case: Case, select: dict[str, Any] | None) -> Tensor:
    """Valid positions within the bounds, written plainly."""
    if select is None:
        return case.rows.loss_mask_P
    values_P = measured(case)[select["by"]]
    inside = [select.get("min", -np.inf) <= float(value) <= select.get("max", np.inf) for value in values_P]
    return case.rows.loss_mask_P & torch.tensor(inside, dtype=torch.bool)


def objective_of(kl: dict[str, Any] | None, ce: dict[str, Any] | None) -> ObjectiveConfig:
    return build(
        ObjectiveConfig,
        {"forward_kl": {"weight": 0.7, "select": kl}, "cross_entropy": {"weight": 0.3, "select": ce}},
    )


def dense(case: Case, config: ObjectiveConfig, num_valid: float) -> Tensor:
    total = torch.zeros(())
    for loss in config.losses.values():
        select = None if loss.select is None else loss.select.model_dump(exclude_none=True)
        total = total + loss.weight * dense_values(case, loss)[chosen(case, select)].sum()
    return total / num_valid


def output_of(case: Case, config: ObjectiveConfig, num_valid: float = 28.0, chunk: int = 7) -> Any:
    return Objective(config, chunk_positions=chunk, context=case.context)(
        case.hidden_PD, case.head, case.rows, num_valid
    )


def gradients(loss: Tensor, case: Case) -> list[Tensor]:
    return list(torch.autograd.grad(loss, case.leaves()))


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    for mine, dense_one in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, dense_one, rtol=1e-10, atol=1e-10)


LOW = {"by": "teacher_entropy", "max": RANGES["teacher_entropy"]["max"]}
SETTINGS = {
    **{by: objective_of(select, None) for by, select in RANGES.items()},
    "both": objective_of(RANGES["confidence"], RANGES["teacher_loss"]),
    "the same": objective_of(LOW, LOW),
    "one bound": objective_of(LOW, {"by": "teacher_loss", "min": RANGES["teacher_loss"]["min"]}),
}


@loop("config", SETTINGS.values(), ids=SETTINGS)
def test_loss_and_gradient_equal_those_of_the_chosen_positions(config):
    output = output_of(CASE, config)
    expected = dense(CASE, config, 28.0)
    torch.testing.assert_close(output.loss, expected)
    assert_same(gradients(output.loss, CASE), gradients(expected, CASE))
    assert output.num_valid == int(CASE.rows.loss_mask_P.sum())
    for name, loss in config.losses.items():
        select = None if loss.select is None else loss.select.model_dump(exclude_none=True)
        mask_P = chosen(CASE, select)
        torch.testing.assert_close(output.sums[name], dense_values(CASE, loss)[mask_P].sum().detach())
        if select is not None:
            assert 0 < int(output.sums[f"{name}_selected"]) == int(mask_P.sum()) < output.num_valid
        else:
            assert f"{name}_selected" not in output.sums


@loop("config", SETTINGS.values(), ids=SETTINGS)
def test_micro_batches_do_not_change_the_gradient(config):
    expected = gradients(dense(CASE, config, 28.0), CASE)
    for size in (1, 9, 40):
        parts = [
            replace(CASE, hidden_PD=CASE.hidden_PD[rows], rows=CASE.rows.select(rows))
            for rows in torch.arange(40).split(size)
        ]
        assert_same(gradients(sum(output_of(part, config).loss for part in parts), CASE), expected)


def test_positions_that_no_loss_looks_at_do_not_go_through_the_head(monkeypatch):
    seen: list[int] = []

    def watched(hidden_PD: Tensor, work: Work) -> Any:
        seen.append(len(hidden_PD))
        return weighted_sum(hidden_PD, work)

    monkeypatch.setattr(objective_module, "weighted_sum", watched)
    config = SETTINGS["both"]
    few = output_of(CASE, config)
    everywhere = build(ObjectiveConfig, config.model_dump() | {"reverse_kl": {"weight": 0.0}})
    all_of_them = output_of(CASE, everywhere)
    needed = chosen(CASE, RANGES["confidence"]) | chosen(CASE, RANGES["teacher_loss"])
    assert seen == [int(needed.sum()), int(CASE.rows.loss_mask_P.sum())]
    assert seen[0] < seen[1]
    torch.testing.assert_close(few.loss, all_of_them.loss)
    assert_same(gradients(few.loss, CASE), gradients(all_of_them.loss, CASE))


def test_where_nothing_is_chosen_everything_is_exactly_zero():
    nothing = {"by": "teacher_entropy", "min": 100.0}
    output = output_of(CASE, objective_of(nothing, nothing))
    assert float(output.loss.detach()) == 0
    assert output.num_valid == int(CASE.rows.loss_mask_P.sum())
    assert {name: float(value) for name, value in output.sums.items()} == dict.fromkeys(output.sums, 0.0)
    assert all(gradient.abs().sum() == 0 for gradient in gradients(output.loss, CASE))


def test_an_infinite_value_where_a_loss_does_not_look_is_no_matter():
    # The teacher's favourite of the most confident position is impossible for the student.
    row = int(measured(CASE)["confidence"].argmax())
    bias_V = CASE.head.bias_V.detach().index_fill(0, CASE.rows.ids_PK[row, :1], -torch.inf).requires_grad_()
    labels_P = torch.full_like(CASE.rows.labels_P, int(CASE.rows.ids_PK[row, -1]))
    possible_P = (CASE.rows.ids_PK != CASE.rows.ids_PK[row, 0]).all(1)
    possible_P[row] = True
    rows = replace(CASE.rows, labels_P=labels_P, loss_mask_P=possible_P)
    case = replace(CASE, head=replace(CASE.head, bias_V=bias_V), rows=rows)
    unsure = {"by": "confidence", "max": float(measured(CASE)["confidence"][row]) - 1e-9}
    assert output_of(case, objective_of(None, None)).loss.isinf()
    for config in (objective_of(unsure, None), objective_of(unsure, unsure)):
        output = output_of(case, config)
        assert output.loss.isfinite()
        assert all(gradient.isfinite().all() for gradient in gradients(output.loss, case)[:2])


def test_scores_of_a_loss_are_those_of_all_positions():
    config = SETTINGS["both"]
    objective = Objective(config, context=CASE.context)
    found = per_position_values(CASE.hidden_PD, CASE.head, CASE.rows, objective)
    for name, loss in config.losses.items():
        torch.testing.assert_close(found[name], dense_values(CASE, loss).detach())


# --------------------------------------------------------------------------------------------- bounds and shares


@loop("by", MEASURES)
def test_measures_are_those_of_the_whole_distribution(by):
    torch.testing.assert_close(MEASURES[by](CASE.rows), measured(CASE)[by].double())
    single = replace(CASE.rows, entropy_P=CASE.rows.entropy_P.float())
    assert MEASURES[by](single).dtype == torch.float64


def test_bounds_are_included_and_mean_the_same_in_all_precisions():
    rows = replace(CASE.rows, entropy_P=torch.linspace(0.1, 4.0, 40, dtype=torch.float32))
    bound = float(rows.entropy_P[7])
    for wide in (rows, rows.with_dtype(torch.float64)):
        assert Select(by="teacher_entropy", min=bound).mask(wide).nonzero()[0] == 7
        assert Select(by="teacher_entropy", max=bound).mask(wide).sum() == 8


@loop("share", [0.001, 0.3, 0.5, 0.999])
def test_a_share_becomes_a_bound_that_chooses_so_many(share):
    values_P = torch.randn(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    top = Select(by="teacher_loss", top=share).resolve(values_P)
    bottom = Select(by="teacher_loss", bottom=share).resolve(values_P)
    assert not top.is_share
    assert not bottom.is_share
    count = round(1000 * share)
    ordered = values_P.sort().values
    assert ((values_P >= top.min).sum(), top.max, top.min) == (count, None, ordered[-count])
    assert ((values_P <= bottom.max).sum(), bottom.min, bottom.max) == (count, None, ordered[count - 1])


def test_of_equal_values_all_are_chosen_and_a_share_of_few_is_at_least_one():
    values_P = torch.tensor([1.0, 1.0, 1.0, 0.5])
    assert Select(by="confidence", top=0.25).resolve(values_P).min == 1.0
    assert Select(by="confidence", bottom=0.01).resolve(values_P).max == 0.5


def test_a_resolved_selection_stays_as_it_is():
    select = Select(by="confidence", min=0.2)
    assert select.resolve(torch.zeros(0)) == select


def test_an_objective_resolves_its_own_shares_alone():
    config = objective_of({"by": "teacher_entropy", "top": 0.25}, {"by": "confidence", "min": 0.3})
    assert config.shares == {"teacher_entropy"}
    resolved = config.resolve({"teacher_entropy": torch.arange(8.0)})
    assert resolved.shares == frozenset()
    assert resolved.forward_kl.select == Select(by="teacher_entropy", min=6.0)
    assert resolved.cross_entropy == config.cross_entropy
    assert config.forward_kl.select.top == 0.25, "the configuration that is recorded keeps the share"
    Objective(resolved)


def test_a_share_that_is_no_bound_yet_is_refused():
    config = objective_of({"by": "teacher_entropy", "top": 0.25}, None)
    with pytest.raises(ConfigError, match=r"converted to a bound .*kdcache.losses.from_cache.resolve_selection"):
        Objective(config)
    for share, end in (("top", "highest"), ("bottom", "lowest")):
        config = objective_of({"by": "teacher_entropy", share: 0.25}, None)
        with pytest.raises(ConfigError, match=rf"no position has a teacher_entropy, .* the {end} values"):
            config.resolve({"teacher_entropy": torch.zeros(0)})


# --------------------------------------------------------------------------------------------- caches, mistakes


@loop("kind", get_args(Kind))
@loop("by", MEASURES)
def test_draws_alone_do_not_tell_the_confidence(by, kind):
    head = LMHead(torch.eye(31)) if kind == "hidden" else None
    context = TeacherContext(kind, 31, head=head)
    config = build(ObjectiveConfig, {"cross_entropy": {"weight": 1.0, "select": {"by": by, "min": 0.5}}})
    reason = incompatibility(config.cross_entropy, context)
    if kind == "outputs":
        with pytest.raises(ConfigError, match=r"^cross_entropy: it needs a distribution at every position"):
            Objective(config, context=context)
    elif (by, kind) == ("confidence", "sampled"):
        assert reason is not None
        with pytest.raises(
            ConfigError, match=r"^cross_entropy: select by confidence needs .* cache holds .*samples from"
        ):
            Objective(config, context=context)
    else:
        assert reason is None
        Objective(config, context=context)


def test_the_confidence_of_a_hybrid_row_is_that_of_its_first_id():
    # The tail's whole mass went to one draw, which now seems more probable than the favourite.
    rows = replace(CASE.rows, logprobs_PK=CASE.rows.logprobs_PK.clone())
    rows.logprobs_PK[:, -1] = -0.01
    torch.testing.assert_close(MEASURES["confidence"](rows), measured(CASE)["confidence"])


def test_rows_without_what_is_asked_for_say_which_key_is_missing():
    case = replace(CASE, rows=replace(CASE.rows, gold_logprob_P=None))
    with pytest.raises(ConfigError, match="teacher_gold_logprob in every training batch"):
        output_of(case, SETTINGS["teacher_loss"])
    output_of(case, SETTINGS["confidence"])


def test_the_gold_log_probability_comes_out_of_a_batch():
    keys = ("teacher_ids", "teacher_logprobs", "teacher_log_tail", "teacher_entropy", "labels", "loss_mask")
    batch = {key: torch.zeros(2, 2 if key in keys[:2] else 0) for key in keys}
    assert TeacherRows.from_batch(batch).gold_logprob_P is None
    gold_P = torch.zeros(2)
    assert TeacherRows.from_batch(batch | {"teacher_gold_logprob": gold_P}).gold_logprob_P is gold_P


class Settings(Config):
    objective: ObjectiveConfig = ObjectiveConfig()


@loop(
    ("select", "message"),
    [
        ("{by: entropy, top: 0.3}", r"select.by': unknown measure 'entropy'; did you mean 'teacher_entropy'"),
        ("{by: teacher_entropy}", r"select': select takes one of: min and max .*, top, bottom"),
        ("{by: teacher_entropy, top: 0.3, min: 1}", r"select': select takes one of"),
        ("{by: teacher_entropy, top: 0.3, bottom: 0.3}", r"select': select takes one of"),
        ("{by: teacher_entropy, min: 3, max: 1}", r"select': min must be at most max, found 3 and 1"),
        ("{by: teacher_entropy, top: 0}", r"select.top': .*greater than 0 .found 0"),
        ("{by: teacher_entropy, top: 1}", r"select.top': .*less than 1 .found 1"),
        ("{by: teacher_entropy, bottom: 30}", r"select.bottom': .*less than 1 .found 30"),
        ("{by: teacher_entropy, min: .nan}", r"select.min': .*finite"),
        ("{by: teacher_entropy, topp: 0.3}", r"unknown setting 'objective.forward_kl.select.topp'; did you mean 'top'"),
        ("{by: confidence, min: 30}", r"select': confidence is a probability between 0 and 1, found 30"),
        ("{by: confidence, min: 0.5, max: 2}", r"select': confidence is a probability between 0 and 1, found 2"),
        ("{top: 0.3}", r"'objective.forward_kl.select.by' is required"),
        ("top", r"'objective.forward_kl.select': .* .found 'top'"),
    ],
)
def test_wrong_settings_give_one_readable_line(select, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load(Settings, assignments=["objective.forward_kl.weight=1", f"objective.forward_kl.select={select}"])
    assert "\n" not in str(caught.value)


def test_what_is_written_into_a_record_reads_back_the_same():
    config = objective_of({"by": "teacher_entropy", "top": 0.25}, RANGES["confidence"])
    assert build(ObjectiveConfig, config.model_dump(mode="json")) == config
