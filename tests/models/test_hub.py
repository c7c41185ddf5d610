"""A model in the hub's cache on this machine, as a download leaves it there."""

from __future__ import annotations

import huggingface_hub.constants
import pytest

from kdcache.models.hub import commit_of, directory_of
from kdcache.models.weights import remembered_sha256, weights_sha256
from kdcache.teachers import TeacherConfig
from kdcache.teachers.huggingface import load_teacher
from tests.tiny import bpe_tokenizer, llama

COMMIT = "0123456789" * 4
NAME = "owner/name"


@pytest.fixture
def snapshot(tmp_path, monkeypatch):
    folder = tmp_path / "hub" / "models--owner--name"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(COMMIT)
    tokenizer = bpe_tokenizer()
    tokenizer.save_pretrained(folder / "snapshots" / COMMIT)
    llama(len(tokenizer), seed=3).save_pretrained(folder / "snapshots" / COMMIT)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return folder / "snapshots" / COMMIT


def test_the_commit_of_a_model(snapshot, tmp_path):
    for revision in (None, "main", COMMIT):
        assert directory_of(NAME, revision) == snapshot
        assert commit_of(NAME, revision) == COMMIT
    for name, revision in ((NAME, "other"), ("owner/other", None), ("no name of a model", None), (str(snapshot), None)):
        assert commit_of(name, revision) is None


def test_a_model_of_the_hub_is_hashed_once(snapshot, monkeypatch):
    model = llama(len(bpe_tokenizer()), seed=3)
    digest = remembered_sha256(model, NAME)
    assert digest == weights_sha256(model)
    monkeypatch.setattr("kdcache.models.weights.weights_sha256", lambda model: "computed again")
    assert remembered_sha256(model, NAME) == digest


def test_the_record_of_a_teacher_names_the_commit(snapshot):
    config = TeacherConfig(model=NAME, device="cpu")
    assert load_teacher(config, len(bpe_tokenizer())).record.revision == COMMIT
