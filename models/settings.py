"""Checks that the settings of a model and of its parts share. Each names the setting, its value and the remedy."""

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from models.errors import ConfigError, nearest


def positive(settings: Any, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{settings.kind}.{name} must be a positive whole number, got {value!r}")


def positive_or_none(settings: Any, *names: str) -> None:
    positive(settings, *[name for name in names if getattr(settings, name) is not None])


def numbers(settings: Any, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ConfigError(f"{settings.kind}.{name} must be a number, got {value!r}")


def flags(settings: Any, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        if not isinstance(value, bool):
            raise ConfigError(f"{settings.kind}.{name} must be true or false, got {value!r}")


def one_of(settings: Any, name: str, known: tuple[Any, ...]) -> None:
    value = getattr(settings, name)
    if value not in known:
        hint = nearest(value, known) if isinstance(value, str) else f"known: {', '.join(map(str, known))}"
        raise ConfigError(f"{settings.kind}.{name} = {value!r} is not known: {hint}")


def step_sizes(settings: Any) -> None:
    """dt_min, dt_max and dt_floor of a state-space mixer."""
    numbers(settings, "dt_min", "dt_max", "dt_floor")
    if not 0 < settings.dt_min <= settings.dt_max:
        raise ConfigError(f"{settings.kind} needs 0 < dt_min <= dt_max, got {settings.dt_min!r}, {settings.dt_max!r}")
    if not settings.dt_floor > 0:
        raise ConfigError(f"{settings.kind}.dt_floor must be above 0, got {settings.dt_floor!r}")


def divides(settings: Any, whole: int, what: str, name: str) -> None:
    """`whole`, named `what`, must be a multiple of the setting `name`."""
    part = getattr(settings, name)
    if whole % part:
        raise ConfigError(f"{what} = {whole} is not a multiple of {settings.kind}.{name} = {part}")


def part(values: Any, kinds: Mapping[str, Any], role: str) -> Any:
    """The settings of a part from a table with its `kind`. Raises ConfigError, with the nearest valid name."""
    if not isinstance(values, Mapping) or "kind" not in values:
        raise ConfigError(f"{role} must be a table with a 'kind' ({', '.join(kinds)}), got {values!r}")
    if values["kind"] not in list(kinds):
        raise ConfigError(f"unknown {role} '{values['kind']}': {nearest(str(values['kind']), kinds)}")
    return build(kinds[values["kind"]].Config, values, role)


def build(cls: type, values: Mapping[str, Any], where: str) -> Any:
    """`cls(**values)`. Raises ConfigError on a key that is unknown or missing."""
    known = {field.name for field in fields(cls)}
    for key in values:
        if key not in known:
            raise ConfigError(f"unknown {where} setting '{key}': {nearest(key, known)}")
    try:
        return cls(**values)
    except TypeError as error:
        raise ConfigError(f"{where}: {str(error).removeprefix(cls.__name__ + '.__init__() ')}") from None
