from __future__ import annotations

from typing import Any

import pytest
import yaml

from kdcache.config import load
from kdcache.dump.config import DumpConfig
from kdcache.errors import ConfigError


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
    assert configure().targets.codec["grid"] != 32


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
    with pytest.raises(ConfigError, match="unknown setting 'gird', did you mean 'grid'"):
        configure("targets.codec.gird=32")


@pytest.mark.parametrize("codec", ["compac", {"name": "compac"}])
def test_a_mistyped_codec_gets_a_suggestion(codec):
    with pytest.raises(ConfigError, match="no such codec, did you mean 'compact'"):
        configure(targets={"codec": codec})


@pytest.mark.parametrize("codec", [3, None, ["compact"], {"name": ["compact"]}])
def test_something_else_than_a_codec_is_refused(codec):
    with pytest.raises(ConfigError, match=r"targets\.codec"):
        configure(targets={"codec": codec})


def test_the_codec_of_hidden_states_has_a_default_too():
    assert configure(hidden_states={"codec": {}}).hidden_states.codec == configure().hidden_states.codec
