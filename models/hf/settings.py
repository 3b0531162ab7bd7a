"""Settings in Hugging Face's words, read strictly; and the one line that refuses what has no counterpart."""

from collections.abc import Mapping
from typing import Any, NoReturn

from models.errors import ConfigError

FLOATS = {"Infinity": float("inf"), "-Infinity": float("-inf"), "NaN": float("nan")}


def refuse(architecture: str, key: str, value: Any, only: str) -> NoReturn:
    raise ConfigError(f"{architecture} with {key} = {value!r} is not supported: {only}")


class Settings:
    """Their `config.json`. A key that is absent or null has the default that `transformers` gives it; without one it
    is required. Every method raises ConfigError with the key, its value and what would be right."""

    def __init__(self, values: Mapping[str, Any], architecture: str) -> None:
        self.values, self.architecture = values, architecture

    def get(self, key: str, default: Any = None) -> Any:
        value = self.values.get(key)
        return default if value is None else value

    def whole(self, key: str, default: int | None = None, least: int = 1) -> int:
        value = self._required(key, default)
        if isinstance(value, float) and value.is_integer():
            value = int(value)  # JSON has one kind of number
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            refuse(self.architecture, key, value, f"it must be a whole number, at least {least}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Above 0 and finite."""
        value = self._required(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            refuse(self.architecture, key, value, "it must be a number above 0")
        return float(value)

    def share(self, key: str) -> float:
        """At least 0 and below 1; by default 0."""
        value = self.get(key, 0.0)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
            refuse(self.architecture, key, value, "it must be at least 0 and below 1")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.get(key, default)
        if not isinstance(value, bool):
            refuse(self.architecture, key, value, "it must be true or false")
        return value

    def only(self, key: str, wanted: Any, why: str = "") -> None:
        """The key is absent or has this value."""
        value = self.get(key, wanted)
        if isinstance(value, bool) != isinstance(wanted, bool) or value != wanted:
            refuse(self.architecture, key, value, f"only {wanted!r}{why}")

    def _required(self, key: str, default: Any) -> Any:
        value = self.get(key, default)
        if value is None:
            raise ConfigError(f"{self.architecture} needs '{key}', which is missing")
        return value


def plain(value: Any) -> Any:
    """JSON's infinity, which `transformers` writes as a table of its own, as a number."""
    if isinstance(value, Mapping) and set(value) == {"__float__"} and value["__float__"] in FLOATS:
        return FLOATS[value["__float__"]]
    if isinstance(value, list):
        return [plain(one) for one in value]
    return value
