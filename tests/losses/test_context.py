"""Which losses make sense with which cache, and what is said about those that do not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kdcache.errors import ConfigError, CorruptCacheError
from kdcache.losses import (
    LOSSES,
    ChunkView,
    CrossEntropy,
    ForwardKL,
    Loss,
    Objective,
    ObjectiveConfig,
    TeacherContext,
    TeacherRows,
    incompatibility,
    score_positions,
)
from kdcache.models.lm_head import LMHead
from tests.loops import loop
from tests.losses.oracle import make_case

HEAD = LMHead(torch.ones(9, 2))
CONTEXTS = {
    "plain": TeacherContext(),
    "ragged": TeacherContext(is_ragged=True),
    "grid": TeacherContext(temperatures=(2.0, 4.0)),
    "prior": TeacherContext(vocab_size=9, prior_V=torch.ones(9)),
    "sampled": TeacherContext("sampled"),
    "hybrid": TeacherContext("hybrid", temperatures=(2.0,), prior_V=torch.ones(9)),
    "hidden": TeacherContext("hidden", vocab_size=9, head=HEAD),
}

REFUSED = [
    ("plain", {"tail": "prior"}, "holds no tail prior; dump it with targets.tail_prior=true, or use tail bucket or"),
    ("plain", {"mode": "full"}, "full needs the teacher's last hidden state and LM head, and the cache holds top-k"),
    ("plain", {"mode": "full", "temperature": 2}, "dump with --targets hidden, or use another mode"),
    (
        "plain",
        {"mode": "grid", "temperature": 2},
        "mass of the tail at temperature 2, and the cache stores the tail at "
        "temperature 1 only; use temperature 1, or mode decoupled",
    ),
    (
        "grid",
        {"mode": "grid", "temperature": 3},
        "at temperature 3, and the cache stores the tail at the temperatures "
        "2, 4; use temperature 1, one of these, or mode decoupled",
    ),
    ("plain", {"tail": "uniform", "temperature": 2}, "tail uniform exists at temperature 1 only, found temperature 2"),
    ("grid", {"tail": "drop", "temperature": 2, "mode": "grid"}, "use tail bucket with it, or temperature 1"),
    ("prior", {"tail": "prior", "temperature": 0.5}, "tail prior exists at temperature 1 only, found temperature 0.5"),
    (
        "sampled",
        {"temperature": 2},
        "holds sampled targets .samples from the teacher's distribution., which estimate the "
        "teacher at temperature 1 only, found temperature 2; use temperature 1, or a cache of top-k or hidden targets",
    ),
    ("hybrid", {"temperature": 2, "mode": "grid"}, "holds hybrid targets .* at temperature 1 only"),
    ("hybrid", {"tail": "prior"}, "tail prior needs the exact mass of the tail, and the cache holds hybrid targets"),
    ("sampled", {"tail": "renormalise"}, "cache holds sampled targets .*; use tail bucket"),
    ("sampled", {"mode": "full"}, "the cache holds sampled targets"),
    (
        "hidden",
        {"tail": "uniform", "mode": "full"},
        "tail uniform is for caches of kept ids, .* which give the whole tail",
    ),
    ("hidden", {"tail": "drop", "temperature": 2}, "tail drop is for caches of kept ids, .* which give the whole tail"),
    ("hidden", {"tail": "prior"}, "tail prior is for caches of kept ids, .* or transcode the cache to top-k targets"),
    # Its rows keep a single id: without the others there would be only that to learn.
    (
        "hidden",
        {"tail": "renormalise", "mode": "decoupled"},
        "tail renormalise is for caches of kept ids, .* which give the whole tail",
    ),
    ("hidden", {"mode": "grid", "temperature": 2}, "stores the tail at temperature 1 only"),
]

ALLOWED = [
    *((name, {}) for name in CONTEXTS),
    *((name, {"temperature": 3}) for name in ("plain", "ragged", "grid", "prior", "hidden")),
    *((name, {"tail": tail}) for name in ("plain", "ragged", "prior") for tail in ("uniform", "renormalise", "drop")),
    ("prior", {"tail": "prior"}),
    ("grid", {"temperature": 4, "mode": "grid"}),
    ("plain", {"mode": "grid"}),
    ("hidden", {"temperature": 0.3, "mode": "full"}),
    ("hidden", {"mode": "decoupled", "temperature": 2}),
    ("sampled", {"mode": "decoupled"}),
]


def forward_kl(settings: dict) -> ForwardKL:
    return ForwardKL.model_validate({"weight": 1.0, **settings})


@loop(("name", "settings", "message"), REFUSED)
def test_what_a_cache_cannot_give_is_refused_before_training(name, settings, message):
    loss, context = forward_kl(settings), CONTEXTS[name]
    reason = incompatibility(loss, context)
    with pytest.raises(ConfigError, match=message) as error:
        Objective(ObjectiveConfig(forward_kl=loss), context=context)
    assert str(error.value) == f"forward_kl: {reason}"
    case = make_case()
    with pytest.raises(ConfigError, match=message):
        score_positions(case.hidden_PD, case.head, case.rows, {"kl": loss}, context=context)


@loop(("name", "settings"), ALLOWED)
def test_what_a_cache_can_give_is_allowed(name, settings):
    loss, context = forward_kl(settings), CONTEXTS[name]
    assert incompatibility(loss, context) is None
    Objective(ObjectiveConfig(forward_kl=loss), context=context)


def test_a_loss_that_is_only_measured_is_checked_too():
    config = ObjectiveConfig(forward_kl=forward_kl({"weight": 0.0, "mode": "full"}), cross_entropy={"weight": 1.0})
    with pytest.raises(ConfigError, match="mode full needs"):
        Objective(config)


class Entropy(Loss):
    is_divergence = False

    def values(self, view: ChunkView) -> torch.Tensor:
        return -(view.student_logprobs_CK.exp() * view.student_logprobs_CK).sum(1)


def test_other_losses_want_true_probabilities_unless_they_say_otherwise():
    loss = Entropy(weight=1.0)
    assert incompatibility(loss, CONTEXTS["plain"]) is None
    with pytest.raises(ConfigError, match=r"toy: it needs the probabilities of the kept ids.*sampled targets"):
        loss.check(CONTEXTS["sampled"], "toy")
    assert all(incompatibility(CrossEntropy(weight=1.0), context) is None for context in CONTEXTS.values())
    assert all(loss.needs for loss in (Entropy, CrossEntropy, ForwardKL))


# --------------------------------------------------------------------------------------------- the record itself


def test_parts_of_another_vocabulary_are_refused():
    with pytest.raises(CorruptCacheError, match="tail prior of the cache has 9 entries, expected one for each of"):
        TeacherContext(vocab_size=8, prior_V=torch.ones(9))
    with pytest.raises(CorruptCacheError, match=r"LM head of the cache has 9 entries.*kdcache verify"):
        TeacherContext("hidden", vocab_size=8, head=HEAD)


def test_a_context_moves_to_a_device_once():
    context = TeacherContext("hidden", 9, prior_V=torch.ones(9), head=replace(HEAD, bias_V=torch.ones(9), scale=2.0))
    assert context.to("cpu") is context
    assert TeacherContext().to("meta").prior_V is None
    moved = context.to("meta")
    assert moved.to("meta") is moved
    assert {moved.prior_V.device.type, moved.head.weight_VD.device.type, moved.head.bias_V.device.type} == {"meta"}
    assert (moved.kind, moved.vocab_size, moved.head.scale) == ("hidden", 9, 2.0)


# ------------------------------------------------------------------------------------- what a cache may not know


def test_a_cache_says_which_facts_it_has():
    everything = TeacherContext(prior_V=torch.ones(5), head=LMHead(torch.ones(5, 2)), vocab_size=5)
    facts = ("entropy", "gold_logprob", "vocabulary_probabilities", "tail_prior", "lm_head")
    assert all(everything.has(fact) for fact in facts)
    assert everything.lacks(*facts) is None
    bare = TeacherContext(scalars=(), probabilities="kept")
    assert not any(bare.has(fact) for fact in facts)
    assert bare.lacks("entropy", "lm_head").startswith("it needs the entropy of the teacher's distribution, which")
    # A hidden state gives the whole distribution, whatever is kept in addition.
    assert TeacherContext(probabilities="kept", head=LMHead(torch.ones(5, 2))).has("vocabulary_probabilities")


@pytest.mark.parametrize("name", LOSSES)
def test_probabilities_of_the_kept_ids_alone_serve_losses_that_are_blind_to_the_tail(name):
    kept = TeacherContext(probabilities="kept", scalars=())
    reason = incompatibility(LOSSES[name](weight=1.0), kept)
    assert (reason is None) is (name in ("cross_entropy", "logits_mse", "ranking"))
    if reason is not None:
        assert "renormalised over the kept ids" in reason
        assert "tail=renormalise" in reason


def test_forward_kl_that_renormalises_needs_no_tail():
    kept = TeacherContext(probabilities="kept", scalars=())
    for tail in ("renormalise", "drop"):
        assert incompatibility(ForwardKL(weight=1, tail=tail), kept) is None
    assert incompatibility(ForwardKL(weight=1, tail="uniform"), kept) is not None


def test_the_estimate_from_samples_needs_the_entropy():
    kl = ForwardKL(weight=1)
    assert incompatibility(kl, TeacherContext(kind="sampled")) is None
    assert "entropy" in incompatibility(kl, TeacherContext(kind="sampled", scalars=("gold_logprob",)))
    assert incompatibility(kl, TeacherContext(scalars=())) is None


@pytest.mark.parametrize(
    ("by", "scalars", "probabilities", "missing"),
    [
        ("teacher_entropy", ("gold_logprob",), "vocabulary", "the entropy"),
        ("teacher_loss", ("entropy",), "vocabulary", "log-probability of the gold token"),
        ("confidence", ("entropy",), "kept", "renormalised"),
    ],
)
def test_a_selection_by_what_the_cache_does_not_know_names_the_loss_and_what_is_missing(
    by, scalars, probabilities, missing
):
    context = TeacherContext(scalars=scalars, probabilities=probabilities)
    loss = LOSSES["ranking"](weight=1, select={"by": by, "min": 0.1})
    with pytest.raises(ConfigError, match=rf"^ranking: select by {by}: it needs .*{missing}.*; "):
        Objective(ObjectiveConfig(ranking=loss), context=context)


def test_rows_without_scalars_train_on_what_does_not_need_them():
    logits = torch.randn(4, 9)
    top = logits.log_softmax(-1).topk(3)
    rows = TeacherRows.from_batch(
        {
            "teacher_ids": top.indices,
            "teacher_logprobs": top.values,
            "teacher_log_tail": torch.log1p(-top.values.exp().sum(1)),
            "labels": torch.zeros(4, dtype=torch.int64),
            "loss_mask": torch.ones(4, dtype=torch.bool),
        }
    )
    assert rows.entropy_P is None
    assert rows.gold_logprob_P is None
    value = ForwardKL(weight=1).values(ChunkView(logits.double(), rows))
    torch.testing.assert_close(value, torch.zeros(4, dtype=torch.float64), atol=1e-6, rtol=0)
    with pytest.raises(ConfigError, match="teacher_entropy"):
        rows.require("entropy_P")
