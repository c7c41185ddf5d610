"""The settings of an objective: which losses and terms, with which weights.

A loss or term is imported and validated when the objective names it. A package whose loss fails to import therefore
affects only objectives that use that loss. Importing this module imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import ConfigDict, ValidationError, create_model, model_validator

from kdcache.config import Config, merge, nested_error
from kdcache.losses.registry import LOSSES, TERMS
from kdcache.losses.schedules import highest

if TYPE_CHECKING:
    from torch import Tensor

    from kdcache.losses.base import Loss, Part, Term

DEFAULT_WEIGHTS: dict[str, Any] = {"forward_kl": {"weight": 0.9}, "cross_entropy": {"weight": 0.1}}

# One optional field for each of kdcache's own losses and terms, so that a record lists them all; those of other
# packages are extra fields. Typed Any: classes are imported on first use, which type checkers cannot follow.
_FIELDS: dict[str, Any] = dict.fromkeys((*LOSSES.own, *TERMS.own), (Any, None))
_OneFieldPerPart: Any = create_model("_OneFieldPerPart", __base__=Config, **_FIELDS)


class ObjectiveConfig(_OneFieldPerPart):
    """Losses by name, such as ``{forward_kl: {weight: 0.9, temperature: 2}, cross_entropy: {weight: 0.1}}``.

    Setting any weight disables every loss that is not listed; a listed one without a weight is then an error. As long
    as no weight is set, the default weights apply (forward_kl 0.9, cross_entropy 0.1) and other settings refine them,
    so ``--set objective.forward_kl.temperature=2`` changes the temperature and nothing else. ``null`` switches a loss
    off. A loss of weight 0 is measured but not trained on. Weights and temperatures may be schedules (see
    ``kdcache.losses.schedules``); ``select`` restricts a loss to some positions (``kdcache.losses.selection``).
    """

    model_config = ConfigDict(extra="allow")

    @model_validator(mode="before")
    @classmethod
    def _of_the_tables(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        if not any(_states_weight(value) for value in data.values()):
            data = merge(DEFAULT_WEIGHTS, data)
        unknown = [name for name in data if name not in LOSSES and name not in TERMS]
        if unknown:  # before any part is imported, which takes a second
            raise nested_error([(cls, {"type": "extra_forbidden", "loc": (name,)}, ()) for name in unknown])
        parts: dict[str, Any] = {}
        problems: list[Any] = []
        for name, value in data.items():
            if value is None:
                parts[name] = None
            else:
                kind = LOSSES[name] if name in LOSSES else TERMS[name]
                try:
                    parts[name] = kind.model_validate(value)
                except ValidationError as error:
                    problems += [(kind, problem, (name,)) for problem in error.errors()]
        if problems:
            raise nested_error(problems)
        return parts

    @model_validator(mode="after")
    def _trains_on_something(self) -> ObjectiveConfig:
        if not any(highest(part.weight) > 0 for part in self.parts.values()):
            raise ValueError(f"at least one of {', '.join(self.setting_names())} needs a weight above 0 at some time")
        return self

    @classmethod
    def setting_names(cls) -> list[str]:
        """Return the names of all losses and terms, including those of other packages; imports none."""
        return [*LOSSES, *TERMS]

    @property
    def parts(self) -> dict[str, Part]:
        """All losses and terms that are on, in the order of the tables."""
        found = {name: part for name, part in self if part is not None}
        return {name: found[name] for name in self.setting_names() if name in found}

    @property
    def losses(self) -> dict[str, Loss]:
        """The losses that are on."""
        return {name: part for name, part in self.parts.items() if name in LOSSES}  # type: ignore[misc]

    @property
    def terms(self) -> dict[str, Term]:
        """The terms that are on."""
        return {name: part for name, part in self.parts.items() if name not in LOSSES}  # type: ignore[misc]

    @property
    def shares(self) -> frozenset[str]:
        """The measures by which a share of the positions is selected; `resolve` needs their values."""
        return frozenset(part.select.by for part in self._selective.values() if part.select.is_share)

    def resolve(self, values: Mapping[str, Tensor]) -> ObjectiveConfig:
        """Return the objective with all shares converted to bounds on ``values``, [P] for each measure of `shares`."""
        parts = {
            name: part.model_copy(update={"select": part.select.resolve(values[part.select.by])})
            for name, part in self._selective.items()
            if part.select.is_share
        }
        return self.model_copy(update=parts)

    @property
    def _selective(self) -> dict[str, Any]:
        return {name: part for name, part in self.parts.items() if part.select is not None}


def _states_weight(value: Any) -> bool:
    return isinstance(value, Config) or (isinstance(value, Mapping) and "weight" in value)
