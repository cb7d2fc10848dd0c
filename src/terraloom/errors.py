"""One error tree: every error says what was found, where, what is allowed and what to do.

TerraloomError
├── ConfigError     a campaign file or one of its keys
├── AoiError        the area of interest
├── SceneError      an item, an asset or a catalogue
├── GridError       tiles, pixels, coordinate systems
├── CoverageError   too few usable observations
├── LabelError      label files, columns, classes
├── FoldError       spatial blocks and folds
├── ModelError      weights, networks, training
├── DesignError     probability samples and estimators
└── StateError      files of a run that are missing or do not fit together
"""

from __future__ import annotations

__all__ = [
    "AoiError",
    "ConfigError",
    "CoverageError",
    "DesignError",
    "FoldError",
    "GridError",
    "LabelError",
    "ModelError",
    "SceneError",
    "StateError",
    "TerraloomError",
]


class TerraloomError(Exception):
    """Base of all errors a user can cause or cure.

    Args:
        found: What was found, in one sentence.
        where: The campaign, key, file, tile or item concerned.
        allowed: What would have been accepted.
        fix: What to do now.
    """

    def __init__(self, found: str, *, where: str = "", allowed: str = "", fix: str = "") -> None:
        self.found = found
        self.where = where
        self.allowed = allowed
        self.fix = fix
        super().__init__(str(self))

    def __str__(self) -> str:
        lines = [f"{self.where}: {self.found}" if self.where else self.found]
        if self.allowed:
            lines.append(f"  allowed: {self.allowed}")
        if self.fix:
            lines.append(f"  to do: {self.fix}")
        return "\n".join(lines)

    def __reduce__(self) -> tuple[object, ...]:
        # Errors cross process pools; the default pickling would lose the keyword fields.
        return (_rebuild, (type(self), self.found, self.where, self.allowed, self.fix))


def _rebuild(
    kind: type[TerraloomError], found: str, where: str, allowed: str, fix: str
) -> TerraloomError:
    return kind(found, where=where, allowed=allowed, fix=fix)


class ConfigError(TerraloomError):
    """A campaign file is not readable or one of its keys is not valid."""


class AoiError(TerraloomError):
    """The area of interest is empty, invalid or outside every scene."""


class SceneError(TerraloomError):
    """An item or asset is missing, truncated, or differs from what its record says."""


class GridError(TerraloomError):
    """A raster does not lie on the grid it should lie on."""


class CoverageError(TerraloomError):
    """Too few usable observations."""


class LabelError(TerraloomError):
    """A label file, its coordinate system, columns or classes cannot be used."""


class FoldError(TerraloomError):
    """The labels cannot be divided into the folds asked for."""


class ModelError(TerraloomError):
    """Weights or network descriptions are missing or do not fit."""


class DesignError(TerraloomError):
    """A sample design or an estimator cannot be applied."""


class StateError(TerraloomError):
    """Files of a run are missing or do not fit together."""
