"""What is told of a student that went on from a checkpoint, and when one that is finished need not be judged again."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from kdcache.sweep.results import HeldOut, StudentResult, write_result
from kdcache.sweep.worker import Job, _training, finished_result


@pytest.mark.parametrize(("first_step", "seconds"), [(0, 6.0), (75, 24.0), (100, 6.0)])
def test_seconds_are_those_of_all_steps(first_step, seconds):
    trained = SimpleNamespace(steps=100, seconds=6.0, losses={"loss": float("nan"), "kl": 2.0}, tokens_per_s=10.0)
    told = _training(trained, first_step)
    assert told["seconds"] == seconds
    assert told["losses"] == {"loss": None, "kl": 2.0}


@pytest.mark.parametrize(("held_out", "is_kept"), [(("held", "one"), True), (("held", "two"), False), (None, True)])
def test_a_student_is_judged_again_by_another_held_out_cache(tmp_path, held_out, is_kept):
    judged = HeldOut(fingerprint="one", loss=1.0, kl=None, agreement=None, ece=None, teacher_loss=None)
    numbers = {"steps": 1, "losses": {}, "seconds": 1.0, "tokens_per_s": 1.0, "num_parameters": 1, "num_bytes": 1}
    write_result(tmp_path, StudentResult(name="a", **numbers, held_out=judged))
    job = Job("a", SimpleNamespace(output=str(tmp_path)), held_out)
    assert (finished_result(job) is not None) is is_kept
