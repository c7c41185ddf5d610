from __future__ import annotations

from typing import Any

import pytest
import yaml

from kdcache.config import build, load
from kdcache.dump.config import DumpConfig
from kdcache.errors import ConfigError
from kdcache.schema import TargetsRecord
from kdcache.teachers import Capabilities
from kdcache.transcode.config import TranscodeConfig
from kdcache.write.config import WriteConfig


def configure(
    *assignments: str, file: str | None = None, options: dict[str, Any] | None = None, **changes: Any
) -> DumpConfig:
    settings = {"output": "cache", "teacher": {"model": "teacher"}, "corpus": {"paths": ["texts.txt"]}, **changes}
    return load(DumpConfig, file=file, options=settings | (options or {}), assignments=assignments)


@pytest.mark.parametrize("codec", [None, "compact", {"name": "compact"}])
def test_a_setting_refines_the_codec_of_the_file(tmp_path, codec):
    path = tmp_path / "dump.yaml"
    path.write_text(yaml.safe_dump({} if codec is None else {"targets": {"codec": codec}}))
    found = configure("targets.codec.grid=32", file=str(path)).targets.codec
    assert (found["name"], found["grid"]) == ("compact", 32)


def test_a_setting_refines_the_default_codec():
    found = configure("targets.codec.grid=32").targets.codec
    assert (found["name"], found["grid"]) == ("compact", 32)
    assert configure().targets_config.codec_settings["grid"] != 32


def test_a_setting_refines_the_codec_of_an_option():
    found = configure("targets.codec.grid=32", options={"targets": {"codec": "compact"}}).targets.codec
    assert (found["name"], found["grid"]) == ("compact", 32)


def test_an_option_replaces_the_codec_of_the_file(tmp_path):
    path = tmp_path / "dump.yaml"
    path.write_text(yaml.safe_dump({"targets": {"codec": {"name": "compact", "grid": 32}}}))
    assert configure(file=str(path), options={"targets": {"codec": "fp16"}}).targets.codec["name"] == "fp16"


@pytest.mark.parametrize("options", [{"targets": {"codec": "fp16"}}, {"targets": {"codec": {"name": "fp16"}}}])
def test_a_setting_of_another_codec_is_refused(options):
    with pytest.raises(ConfigError, match=r"'targets\.codec'.*codec fp16.*unknown setting 'grid'"):
        configure("targets.codec.grid=32", options=options)


def test_a_mistyped_setting_gets_a_suggestion():
    with pytest.raises(ConfigError, match="unknown setting 'gird'; did you mean 'grid'"):
        configure("targets.codec.gird=32")


@pytest.mark.parametrize("codec", ["compac", {"name": "compac"}])
def test_a_mistyped_codec_gets_a_suggestion(codec):
    with pytest.raises(ConfigError, match="unknown codec 'compac'; did you mean 'compact'"):
        configure(targets={"codec": codec})


@pytest.mark.parametrize("codec", [3, ["compact"], {"name": ["compact"]}])
def test_something_else_than_a_codec_is_refused(codec):
    with pytest.raises(ConfigError, match=r"targets\.codec"):
        configure(targets={"codec": codec})


def test_the_codec_of_hidden_states_has_a_default_too():
    assert configure(hidden_states={"codec": {}}).hidden_states.codec == configure().hidden_states.codec


def test_one_path_may_be_set_as_a_text():
    assert configure("corpus.paths=texts.jsonl").corpus.paths == ("texts.jsonl",)


@pytest.mark.parametrize("paths", ["[]", "3", "null"])
def test_something_else_than_paths_is_refused(paths):
    with pytest.raises(ConfigError, match=r"corpus\.paths"):
        configure(f"corpus.paths={paths}")


@pytest.mark.parametrize(
    ("layers", "found"), [("last,12", ("last", 12)), ("[last, -1]", ("last", -1)), ("3", (3,)), ("[]", ())]
)
def test_layers_are_numbers_or_last(layers, found):
    layers_found = configure(f"hidden_states.layers={layers}").hidden_states.layers
    assert tuple(str(layer) for layer in layers_found) == tuple(str(layer) for layer in found)


@pytest.mark.parametrize("layers", ["true", "[true]", "[1, false]", "[1.5]", "{a: 1}", "null"])
def test_something_else_than_layers_is_refused(layers):
    with pytest.raises(ConfigError, match=r"hidden_states\.layers"):
        configure(f"hidden_states.layers={layers}")


def test_an_empty_output_is_refused():
    with pytest.raises(ConfigError, match=r"'output': .*at least 1 character"):
        configure("output=''")


BASE = {"output": "cache", "teacher": {"model": "teacher"}, "corpus": {"paths": ["texts.txt"]}}
ROUND_TRIPS = {
    "nothing given": (DumpConfig, BASE),
    "classes": (DumpConfig, {**BASE, "task": "sequence-classification"}),
    "embedding": (DumpConfig, {**BASE, "task": "embedding", "sequences": {"max_length": 64}}),
    "seq2seq": (DumpConfig, {**BASE, "task": "seq2seq-lm"}),
    "hybrid": (DumpConfig, {**BASE, "targets": {"kind": "hybrid"}}),
    "one number": (DumpConfig, {**BASE, "targets": {"top_k": 5}, "hidden_states": {"layers": "last"}}),
    "everything": (
        DumpConfig,
        {
            **BASE,
            "teacher": {"model": "teacher", "device": "cpu", "revision": "v1"},
            "targets": {"top_k": 5, "tail_prior": False, "scalars": ["entropy"], "tail": "remainder", "codec": "fp16"},
        },
    ),
    "transcode nothing": (TranscodeConfig, {"source": "a", "output": "b"}),
    "transcode to a kind": (TranscodeConfig, {"source": "a", "output": "b", "targets": {"kind": "top-k"}}),
    "transcode no states": (TranscodeConfig, {"source": "a", "output": "b", "hidden_states": {"layers": []}}),
    "transcode codec": (TranscodeConfig, {"source": "a", "output": "b", "hidden_states": {"codec": "int8"}}),
    "write": (WriteConfig, {**BASE, "output": "a.jsonl"}),
    "write samples": (WriteConfig, {**BASE, "output": "a.jsonl", "writing": {"sample": True}}),
    "write seeded samples": (WriteConfig, {**BASE, "output": "a.jsonl", "writing": {"sample": True, "seed": 3}}),
    "write beams": (WriteConfig, {**BASE, "output": "a.jsonl", "writing": {"beams": 2}}),
}


@pytest.mark.parametrize("name", ROUND_TRIPS)
@pytest.mark.parametrize("mode", ["python", "json"])
def test_a_configuration_that_is_dumped_and_built_again_means_the_same(name, mode):
    model, settings = ROUND_TRIPS[name]
    config = build(model, settings)
    again = build(model, config.model_dump(mode=mode))
    assert again == config
    assert again.model_dump() == config.model_dump()
    # What the configurations decide by themselves must not depend on which settings were written out.
    if isinstance(config, DumpConfig):
        assert again.targets_config.record == config.targets_config.record
        assert again.for_teacher(TOP_K_ONLY) == config.for_teacher(TOP_K_ONLY)
    elif isinstance(config, TranscodeConfig):
        assert again.settings() == config.settings()
    else:
        assert (again.writing.num_beams, again.writing.sampling) == (config.writing.num_beams, config.writing.sampling)


TOP_K_ONLY = Capabilities(max_top_k=20)


def test_defaults_follow_from_what_the_teacher_gives():
    targets = configure().for_teacher(TOP_K_ONLY).targets
    assert targets.record == TargetsRecord(top_k=20, tail="remainder", scalars=())
    assert targets.codec_settings["name"] == "fp16"
    knows_more = Capabilities(scalars=("log_tail", "gold_logprob"))
    targets = configure().for_teacher(knows_more).targets
    assert targets.record == TargetsRecord(top_k=64, scalars=("log_tail", "gold_logprob"))
    assert targets.codec_settings["name"] == "compact"


def test_what_is_given_stays_whatever_the_teacher_gives():
    given = configure("targets.top_k=64", "targets.tail_prior=true", "targets.tail=exact", "targets.codec=exact")
    record = given.for_teacher(TOP_K_ONLY).targets.record
    assert (record.top_k, record.tail_prior, record.tail) == (64, True, "exact")
    assert configure("targets.kind=hybrid").for_teacher(TOP_K_ONLY) == configure("targets.kind=hybrid")
    logits = Capabilities(logits=True)
    assert configure().for_teacher(logits) == configure()
