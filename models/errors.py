"""What can go wrong because of a person or a machine, as opposed to a defect of ours."""

import difflib
from collections.abc import Iterable


class ConfigError(ValueError):
    """A model configuration that cannot be built. The message names the value and the remedy."""


class BackendUnavailableError(RuntimeError):
    """A backend was asked for by name and this machine lacks it. The message names the remedy."""


LISTED = 12  # names that fit in a line


def nearest(name: str, known: Iterable[str], rest: str = "") -> str:
    """A hint for a misspelt `name`: the nearest known name, or where none is near what there is, a few of many. rest:
    where the others are found."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    listed = ", ".join(known[:LISTED])
    if len(known) > LISTED:
        listed += f" and {len(known) - LISTED} more" + (f" ({rest})" if rest else "")
    return f"did you mean '{close[0]}'?" if close else f"known: {listed}"
