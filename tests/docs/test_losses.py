from __future__ import annotations

import pytest
import torch

from kdcache.losses import LOSSES, ForwardKL, TeacherContext, incompatibility
from kdcache.losses.divergences import LEAST_LOG_PROB
from kdcache.losses.temperature import TemperedLoss
from kdcache.models.lm_head import LMHead
from tests.docs.pages import DOCS, rows, sections

PAGE = (DOCS / "losses.md").read_text()
# A bar inside a formula is escaped, and ends no cell.
TABLE = rows(sections(PAGE)["The table"].replace("\\|", "¦"))
CONTEXTS = {
    "top-k": TeacherContext(),
    "sampled": TeacherContext("sampled"),
    "hybrid": TeacherContext("hybrid", num_kept=4),
    "hidden": TeacherContext("hidden", 9, head=LMHead(torch.ones(9, 2))),
}


def test_every_loss_has_its_row_in_the_order_of_the_table():
    assert list(TABLE) == list(LOSSES)


@pytest.mark.parametrize("name", LOSSES)
def test_a_row_says_which_caches_serve_the_loss(name):
    for said, context in zip(TABLE[name][2:6], CONTEXTS.values(), strict=True):
        assert said in ("yes", "no", "exact", "estimate", "kept ids")
        assert (incompatibility(LOSSES[name](weight=1.0), context) is None) is (said != "no")
        assert (said == "exact") <= (context.kind == "hidden")
        assert (said == "kept ids") is (context.kind == "hybrid" and LOSSES[name].ignores_samples)


@pytest.mark.parametrize("name", LOSSES)
def test_a_row_says_which_parameters_and_modes_there_are(name):
    loss = LOSSES[name]
    own = set(loss.model_fields) - {"weight", "select", "temperature", "mode"}
    said = dict(cell.replace("`", "").split(" = ") for cell in TABLE[name][1].split(", ") if cell)
    assert said == {field: str(loss.model_fields[field].default) for field in own}
    modes = loss.modes if issubclass(loss, TemperedLoss) else ()
    assert TABLE[name][6] == ", ".join(modes)


def test_numbers_of_the_prose():
    assert LEAST_LOG_PROB == -104
    assert "counts as e⁻¹⁰⁴" in PAGE
    assert ForwardKL.model_fields["tail"].default == "bucket"
    assert torch.tensor(LEAST_LOG_PROB).exp() == 0 < torch.tensor(LEAST_LOG_PROB + 1).exp()
