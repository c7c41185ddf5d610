from __future__ import annotations

from kdcache.config import merge, parse_assignments


def test_settings_laid_over_a_name_refine_the_component_of_that_name():
    assert merge({"codec": "compact"}, {"codec": {"grid": 32}}) == {"codec": {"name": "compact", "grid": 32}}
    assert merge({"a": {"codec": "x"}}, {"a": {"codec": {"b": {"c": 1}}}}) == {
        "a": {"codec": {"name": "x", "b": {"c": 1}}}
    }


def test_a_mapping_with_a_name_replaces_a_name():
    assert merge({"codec": "compact"}, {"codec": {"name": "fp16"}}) == {"codec": {"name": "fp16"}}


def test_a_name_replaces_a_mapping():
    assert merge({"codec": {"name": "compact", "grid": 32}}, {"codec": "fp16"}) == {"codec": "fp16"}


def test_assignments_refine_an_earlier_one():
    assert parse_assignments(["c=compact", "c.grid=32"]) == {"c": {"name": "compact", "grid": 32}}


def test_only_a_text_is_a_name():
    assert merge({"x": 3}, {"x": {"y": 1}}) == {"x": {"y": 1}}
