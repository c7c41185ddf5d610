from typing import Any

import pytest
import torch

from kdcache.cli import COMMANDS
from kdcache.codecs import HIDDEN_CODECS, TOPK_CODECS
from kdcache.corpus.sources import FORMATS
from kdcache.losses import LOSSES, ChunkView, Loss
from kdcache.students.sizes import SIZES
from kdcache.tasks import TASKS
from tests.docs.pages import DOCS, ROOT, blocks, sections

PAGE = (DOCS / "extending.md").read_text()
TABLES = {
    "LOSSES": LOSSES,
    "TOPK_CODECS": TOPK_CODECS,
    "HIDDEN_CODECS": HIDDEN_CODECS,
    "TASKS": TASKS,
    "FORMATS": FORMATS,
    "SIZES": SIZES,
    "COMMANDS": COMMANDS,
}


@pytest.fixture(scope="module")
def namespace() -> dict[str, Any]:
    found = blocks(PAGE, "python")
    assert len(found) == 4
    # Classes made by exec need a module whose annotations pydantic can look up.
    names: dict[str, Any] = {"__name__": __name__}
    for block in found:
        exec(compile(block, "docs/extending.md", "exec"), names)
    return names


def test_loss_of_the_page_is_the_total_variation(namespace: dict[str, Any]) -> None:
    loss, logprobs, teacher = (namespace[name] for name in ("loss", "teacher_logprobs", "teacher"))
    assert isinstance(loss, Loss)
    student = torch.randn(logprobs.shape).log_softmax(-1)

    def buckets(logprobs_PV: torch.Tensor) -> torch.Tensor:
        head = logprobs_PV.exp().gather(1, teacher.ids_PK)
        return torch.cat([head, 1 - head.sum(1, keepdim=True)], 1)

    expected = (buckets(student) - buckets(logprobs)).abs().sum(1) / 2
    torch.testing.assert_close(loss.values(ChunkView(student, teacher)), expected, rtol=1e-4, atol=1e-6)


def test_codec_of_the_page_decodes_any_slice(namespace: dict[str, Any]) -> None:
    codec, encoded, decoded = (namespace[name] for name in ("codec", "encoded", "decoded"))
    part = codec.decode({name: values[1:3] for name, values in encoded.items()})
    assert (part.logprobs_PK == decoded.logprobs_PK[1:3]).all()
    assert codec.model_dump() == {"name": "one-byte", "grid": 16, "scalar_dtype": "float16"}


def test_examples_leave_the_tables_alone(namespace: dict[str, Any]) -> None:
    assert "total_variation" not in LOSSES
    assert "one-byte" not in TOPK_CODECS


def test_tables_are_where_the_page_says() -> None:
    listed = {}
    for line in sections(PAGE)["Extending kdcache"].splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and " in `kdcache/" in cells[1] and cells[0] != "teacher backend":
            name, path = (part.strip("`") for part in cells[1].split(" in "))
            listed[name] = path
    assert set(listed) == set(TABLES)
    for name, path in listed.items():
        source = (ROOT / path).read_text()
        assert f"\n{name} = " in source or f"\n{name}: " in source, path


def test_page_shows_the_table_of_losses_with_one_row_more() -> None:
    shown = [line.split('"')[1] for line in PAGE.splitlines() if line.startswith('        "')]
    assert shown == [*LOSSES, "total_variation"]


def test_names_that_the_prose_relies_on_exist() -> None:
    from kdcache.dump.batches import Teacher
    from kdcache.schema import TeacherRecord
    from kdcache.tasks import causal_lm

    assert all(codec().kl_bound > 0 for codec in TOPK_CODECS.values())
    assert hasattr(Teacher, "run")
    assert "backend" in TeacherRecord.model_fields
    assert all(callable(getattr(causal_lm, name)) for name in ("labels", "pad_batch", "collate"))
