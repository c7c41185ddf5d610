from __future__ import annotations

from typing import get_args

import pytest
import yaml

from kdcache.config import build
from kdcache.errors import ConfigError
from kdcache.schema import KINDS, TargetsRecord
from kdcache.targets_config import TargetsConfig
from tests.dump.test_dump_config import configure
from tests.loops import loop

#: What each kind keeps where nothing else is said: top_k, num_samples, tail_prior.
DEFAULTS = {
    "top-k": (64, 0, True),
    "sampled": (0, 50, False),
    "hybrid": (4, 16, False),
    "hidden": (1, 0, False),
    "outputs": (0, 0, False),
}


def test_every_kind_is_here():
    assert tuple(DEFAULTS) == KINDS == get_args(TargetsRecord.model_fields["kind"].annotation)


@loop("kind", KINDS)
def test_defaults_of_a_kind(kind):
    # Outputs belong to tasks without distributions, whose dumps choose them by themselves.
    targets = build(TargetsConfig, {"kind": kind}) if kind == "outputs" else configure(f"targets.kind={kind}").targets
    record = targets.record
    assert (record.top_k, record.num_samples, record.tail_prior) == DEFAULTS[kind]
    assert (record.min_prob, record.min_mass, record.temperatures, record.seed) == (0, 1, (), 0)
    assert targets.codec_settings["name"] == "compact"
    assert record == TargetsRecord(
        kind=kind, top_k=record.top_k, num_samples=record.num_samples, tail_prior=record.tail_prior
    )


def test_without_a_kind_it_is_top_k():
    assert configure().targets is None
    assert configure().targets_config == configure("targets.kind=top-k").targets


def test_what_is_given_replaces_a_default():
    assert configure("targets.top_k=8", "targets.tail_prior=false").targets.record == TargetsRecord(top_k=8)
    hybrid = configure("targets.kind=hybrid", "targets.top_k=3").targets.record
    assert (hybrid.top_k, hybrid.num_samples) == (3, 16)
    sampled = configure("targets.kind=sampled", "targets.num_samples=300", "targets.seed=7").targets.record
    assert (sampled.top_k, sampled.num_samples, sampled.seed) == (0, 300, 7)


CONTRADICTIONS = {
    "kind=sampled,top_k=4": "targets of the kind sampled keep no ids, leave top_k out (the kind hybrid keeps some)",
    "kind=top-k,top_k=0": "targets of the kind top-k need a top_k of 1 or more",
    "kind=hybrid,top_k=0": "targets of the kind hybrid need a top_k of 1 or more",
    "kind=hidden,top_k=0": "targets of the kind hidden need a top_k of 1 or more",
    "kind=sampled,num_samples=0": "targets of the kind sampled need num_samples of 1 or more",
    "kind=hybrid,num_samples=0": "targets of the kind hybrid need num_samples of 1 or more",
    "num_samples=50": "targets of the kind top-k take no samples (the kinds sampled and hybrid do)",
    "kind=hidden,num_samples=50": "targets of the kind hidden take no samples (the kinds sampled and hybrid do)",
    "kind=sampled,min_prob=0.001": "targets of the kind sampled have no min_prob and min_mass (the kind top-k has)",
    "kind=hybrid,min_mass=0.9": "targets of the kind hybrid have no min_prob and min_mass (the kind top-k has)",
    "kind=hidden,tail_prior=true": "targets of the kind hidden have no tail prior (the kind top-k has)",
    "kind=sampled,temperatures=2": "targets of the kind sampled have no temperatures of the tail (the kind top-k has)",
}


@loop("settings", CONTRADICTIONS)
def test_contradictions_are_named(settings):
    with pytest.raises(ConfigError) as caught:
        configure(*(f"targets.{setting}" for setting in settings.split(",")))
    assert CONTRADICTIONS[settings] in str(caught.value)
    assert "'targets'" in str(caught.value)


@loop(
    ("text", "found"),
    [
        ("2,4", (2.0, 4.0)),
        ("'2, 0.5,'", (0.5, 2.0)),
        ("[4, 2, 4]", (2.0, 4.0)),
        ("3", (3.0,)),
        ("0.25", (0.25,)),
        ("[]", ()),
        ("''", ()),
    ],
)
def test_temperatures_are_a_number_a_list_or_a_text(text, found):
    assert configure(f"targets.temperatures={text}").targets.temperatures == found


@loop("text", ["1", "2,1", "[1.0]", "0", "-2", "[2, 0]", ".inf", ".nan"])
def test_temperatures_that_are_none_are_refused(text):
    with pytest.raises(ConfigError, match="temperatures are above 0 and not 1, at which the tail is always stored"):
        configure(f"targets.temperatures={text}")


@loop(
    ("setting", "words"),
    [
        ("temperatures=warm", "targets.temperatures"),
        ("temperatures=null", "targets.temperatures"),
        ("kind=topk", "targets.kind"),
        ("top_k=-1", "targets.top_k"),
        ("top_k=1.5", "targets.top_k"),
        ("min_prob=1", "targets.min_prob"),
        ("min_prob=-0.1", "targets.min_prob"),
        ("min_mass=0", "targets.min_mass"),
        ("min_mass=1.1", "targets.min_mass"),
        ("num_samples=-1", "targets.num_samples"),
        ("num_samples=1000000000", "targets.num_samples': Input should be less than or equal to 4096"),
        ("seed=-1", "targets.seed"),
        ("seed=4294967296", "targets.seed"),
        ("num_sample=5", "did you mean 'num_samples'?"),
    ],
)
def test_values_out_of_range_name_the_setting(setting, words):
    with pytest.raises(ConfigError) as caught:
        configure(f"targets.{setting}")
    assert words in str(caught.value)


def test_settings_of_a_file(tmp_path):
    path = tmp_path / "dump.yaml"
    settings = {"kind": "top-k", "top_k": 32, "min_prob": 0.001, "temperatures": [2, 4], "codec": {"grid": 8}}
    path.write_text(yaml.safe_dump({"targets": settings, "hidden_states": {"layers": "last", "codec": "int8"}}))
    config = configure(file=str(path))
    assert config.targets.record == TargetsRecord(top_k=32, min_prob=0.001, temperatures=(2.0, 4.0), tail_prior=True)
    assert config.targets.codec["grid"] == 8
    assert config.hidden_states.codec == {"name": "int8"}


def test_text_of_a_file(tmp_path):
    path = tmp_path / "dump.yaml"
    path.write_text("targets:\n  temperatures: 2,4\n")
    assert configure(file=str(path)).targets.temperatures == (2.0, 4.0)
    assert configure("targets.temperatures=3", file=str(path)).targets.temperatures == (3.0,)


def test_an_option_changes_the_kind_of_the_file(tmp_path):
    path = tmp_path / "dump.yaml"
    path.write_text("targets:\n  kind: sampled\n  seed: 3\n")
    found = configure(file=str(path), options={"targets": {"kind": "hybrid"}}).targets.record
    assert (found.kind, found.top_k, found.num_samples, found.seed) == ("hybrid", 4, 16, 3)
