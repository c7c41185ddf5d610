"""What `import kdcache` gives: names of one style, and every type that they mention."""

import inspect
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import pytest

import kdcache
from kdcache.cli import COMMANDS
from tests.test_architecture import ROOT

#: Functions that are no verbs of the command line: they open, convert or connect.
CONVERSIONS = {"context_of", "load_student", "open_cache", "to_arrow", "to_arrow_reader", "to_hf_dataset", "to_torch"}
#: Named by public signatures, but internal: what they are does not matter to a caller.
INTERNAL = {
    "Columns": "a table with named columns: a pyarrow.Table or a SequenceTable",
    "LMHead": "a student's LM head, handed from a student to an objective",
    "Needs": "the layers and outputs that an objective asks a student for",
    "Outputs": "raw outputs of both models, inside LayerStates",
    "Parts": "body and head of a model",
    "SentenceModel": "how a sentence encoder pools",
    "ShardArrays": "the encoded arrays of an open shard",
    "Task": "tasks are chosen by name",
}


def public() -> dict[str, Any]:
    return {name: getattr(kdcache, name) for name in kdcache.__all__}


def test_every_name_is_defined_where_the_stub_says():
    names = public()
    assert sorted(names) == kdcache.__all__
    assert {*names} <= {*dir(kdcache)}
    for name, value in names.items():
        assert value.__doc__, name


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'dump_techer'"):
        kdcache.dump_techer  # noqa: B018


def test_importing_kdcache_imports_nothing_else():
    code = "import sys; before = set(sys.modules); import kdcache; print(*sorted(set(sys.modules) - before))"
    new = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert [name for name in new if name.split(".")[0] not in sys.stdlib_module_names] == ["kdcache"]


def test_every_command_has_its_function():
    functions = {name for name, value in public().items() if inspect.isfunction(value)}
    for command in COMMANDS:
        verb = command.split("-")[0]
        assert any(name.startswith(f"{verb}_") for name in functions), command
    commands = {command.split("-")[0] for command in COMMANDS}
    others = {name for name in functions if name.split("_")[0] not in commands | {"preview"}}
    assert others == CONVERSIONS


def annotations_of(name: str, value: Any) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield place, annotation and namespace of all that a public function or class says about types."""
    namespace = vars(sys.modules[value.__module__])
    if inspect.isfunction(value):
        for argument, annotation in value.__annotations__.items():
            yield f"{name}({argument})", annotation, namespace
        return
    for member, annotation in vars(value).get("__annotations__", {}).items():
        if not member.startswith("_") and "ClassVar" not in str(annotation):
            yield f"{name}.{member}", annotation, namespace
    for member, found in vars(value).items():
        function = getattr(found, "fget", None) or getattr(found, "__func__", found)
        function = found.func if isinstance(found, cached_property) else function
        if inspect.isfunction(function) and function.__module__ == value.__module__ and not member.startswith("_"):
            yield from annotations_of(f"{name}.{member}", function)


def test_every_type_that_a_public_signature_mentions_is_public():
    known = public()
    assert len(known) > 90
    missing: dict[str, list[str]] = {}
    for name, value in known.items():
        if isinstance(value, type) and issubclass(value, Exception):
            continue
        for place, annotation, namespace in annotations_of(name, value):
            for word in re.findall(r"(?<![\w.])[A-Za-z_]\w*", str(annotation)):
                found = namespace.get(word)
                is_own = isinstance(found, type) and found.__module__.startswith("kdcache.")
                if is_own and found not in known.values() and word not in INTERNAL:
                    missing.setdefault(word, []).append(place)
    assert missing == {}


def test_the_version_stands_in_one_place():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" not in project["project"]
    assert project["project"]["dynamic"] == ["version"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "kdcache.__version__"}
