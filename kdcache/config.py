"""Strict configuration: one frozen pydantic model per component, filled from a YAML file and ``--set`` overrides.

The parameters of a component are the fields of its frozen model, so what was validated is what is written into the
manifest. Unknown keys are errors with a suggestion, because a silently ignored ``temprature`` costs a training run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import PydanticCustomError

from kdcache.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    import yaml


class Config(BaseModel):
    """Base class of configurations and records: frozen, and unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    @classmethod
    def setting_names(cls) -> list[str]:
        """Return the names of all settings, for suggestions when a name is unknown."""
        return list(cls.model_fields)


C = TypeVar("C", bound=Config)

#: Type of the errors that `nested_error` makes.
_NESTED = "nested_settings"


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML mapping; raises ``ConfigError``, naming file and line."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read configuration file {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"configuration file {path} is not text; it must be YAML in UTF-8") from None
    import yaml  # only where a file or --set is read: records are configurations too

    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {_yaml_problem(error)}") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"{path} must hold a mapping of settings, found {type(data).__name__}")
    return data


def _yaml_problem(error: yaml.YAMLError) -> str:
    """Return the problem and its position in one line; the message of the library has several."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    if mark is None or problem is None:
        return " ".join(str(error).split())
    return f"line {mark.line + 1}, column {mark.column + 1}: {problem}"


def merge(base: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``base`` updated with ``changes``, recursively for mappings; other values are replaced.

    A component may be given by its name alone, so updating a name with settings refines the component of that name:
    ``{"codec": "compact"}`` updated with ``{"codec": {"grid": 32}}`` is ``{"codec": {"name": "compact", "grid": 32}}``.
    """
    merged = dict(base)
    for key, value in changes.items():
        previous = merged.get(key)
        if isinstance(value, Mapping) and isinstance(previous, str) and "name" not in value:
            previous = {"name": previous}
        if isinstance(value, Mapping) and isinstance(previous, dict):
            merged[key] = merge(previous, value)
        else:
            merged[key] = value
    return merged


def parse_assignments(assignments: Iterable[str]) -> dict[str, Any]:
    """Turn ``["a.b=1", "c=x"]`` into ``{"a": {"b": 1}, "c": "x"}``; values are read as YAML."""
    import yaml

    tree: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if not equals or not key:
            raise ConfigError(f"--set takes key.sub=value, found {assignment!r}")
        try:
            nested: Any = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"the value of --set {assignment} is not valid YAML: {_yaml_problem(error)}") from None
        tree = merge(tree, nest(key, nested))
    return tree


def nest(key: str, value: Any) -> dict[str, Any]:
    """Return ``{"a": {"b": value}}`` for the dotted key ``a.b``."""
    nested = value
    for part in reversed(key.split(".")):
        nested = {part: nested}
    tree: dict[str, Any] = nested
    return tree


def build(model: type[C], data: Mapping[str, Any], *, source: str = "configuration") -> C:
    """Validate ``data`` as ``model``; raises ``ConfigError`` with one readable line per problem."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        lines = [_explain(model, problem) for problem in error.errors()]
        raise ConfigError(f"{source}: " + "; ".join(lines)) from None


def build_nested(model: type[C], data: Any) -> C:
    """Validate ``data`` as ``model`` inside the validator of a field whose model depends on other fields.

    `build` of the outer model reports problems as if the field had that model.
    """
    if not isinstance(data, Mapping):
        raise ValueError("expected a mapping of settings")
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise nested_error([(model, problem, ()) for problem in error.errors()]) from None


def nested_error(problems: Sequence[tuple[type[BaseModel], Mapping[str, Any], tuple[Any, ...]]]) -> PydanticCustomError:
    """Return an error for a validator to raise, with the ``problems`` of other models.

    Each problem is a model, an item of its ``ValidationError.errors()``, and the location of that model relative to the
    validator. `build` reports each of them under its full path.
    """
    lines = [_explain(model, problem, ".".join(map(str, at))) for model, problem, at in problems]
    return PydanticCustomError(_NESTED, "{problems}", {"problems": "; ".join(lines), "nested": list(problems)})


def load(
    model: type[C],
    *,
    file: str | Path | None = None,
    assignments: Iterable[str] = (),
    options: Mapping[str, Any] | None = None,
) -> C:
    """Build ``model`` from a YAML ``file``, then explicit ``options``, then ``--set`` ``assignments`` (later wins)."""
    data = read_yaml(file) if file else {}
    data = merge(data, options or {})
    data = merge(data, parse_assignments(assignments))
    return build(model, data, source=str(file) if file else "settings")


def _explain(model: type[BaseModel], problem: Mapping[str, Any], inside: str = "") -> str:
    location = problem["loc"]
    path = ".".join(str(part) for part in (*([inside] if inside else []), *location))
    if problem["type"] == _NESTED:
        inner = problem["ctx"]["nested"]
        return "; ".join(_explain(m, p, ".".join(filter(None, [path, *map(str, at)]))) for m, p, at in inner)
    if problem["type"] == "extra_forbidden":
        return f"unknown setting {path!r}; {did_you_mean(str(location[-1]), _fields_at(model, location[:-1]))}"
    if problem["type"] == "missing":
        return f"{path!r} is required"
    message = str(problem["msg"]).removeprefix("Value error, ")
    if not path:
        return message
    found = problem.get("input")
    is_named = isinstance(found, str) and repr(found) in message
    return f"{path!r}: {message}" + ("" if is_named else f" (found {found!r})")


def _fields_at(model: type[BaseModel], location: Iterable[Any]) -> list[str]:
    """Return the names of the settings at ``location`` of ``model`` (none if that is not a nested model)."""
    current: Any = model
    for part in location:
        if isinstance(part, int):  # an index in a list of `current`
            continue
        annotation = current.model_fields[part].annotation if part in getattr(current, "model_fields", {}) else None
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        nested = [c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)]
        if not nested:
            return []
        current = nested[0]
    return list(current.setting_names() if issubclass(current, Config) else current.model_fields)
