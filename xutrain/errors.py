"""The user's faults, as classes with data. The command line turns them into exit codes, and nowhere else does."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Issue:
    """One thing wrong at one place: a recipe key, a flag or a file.

    Renders as ``error: <where>: <what> (got <value>)`` and ``hint: <hint>``.
    """

    where: str
    what: str
    value: object = None
    hint: str = ""
    has_value: bool = True

    def lines(self) -> list[str]:
        got = f" (got {_short(self.value)})" if self.has_value else ""
        place = f"{self.where}: " if self.where else ""
        lines = [f"error: {place}{self.what}{got}"]
        return [*lines, f"hint: {self.hint}"] if self.hint else lines

    def as_dict(self) -> dict[str, object]:
        return {"where": self.where, "what": self.what, "value": _short(self.value) if self.has_value else None, "hint": self.hint}


def _short(value: object, width: int = 120) -> str:
    text = repr(value)
    return text if len(text) <= width else text[: width - 3] + "..."


class XutrainError(Exception):
    """Base of every error that a user can mend. ``exit_code`` is what the command line returns."""

    exit_code = 1

    def __init__(self, *issues: Issue) -> None:
        self.issues = list(issues)
        super().__init__("\n".join(line for issue in issues for line in issue.lines()))

    @classmethod
    def at(cls, where: str, what: str, *, hint: str = "", **value: object) -> XutrainError:
        """Build from one place; pass ``value=...`` to show the offending value."""
        return cls(Issue(where, what, value.get("value"), hint, has_value="value" in value))


class UsageError(XutrainError):
    """A wrong flag or a wrong combination of flags (exit code 2)."""

    exit_code = 2


class RecipeError(XutrainError, ValueError):
    """A recipe, an override or an option of a method that cannot be right (exit code 2)."""

    exit_code = 2


class DataError(XutrainError):
    """Data or a model that is missing, corrupt or of the wrong shape (exit code 3)."""

    exit_code = 3


class Diverged(XutrainError):
    """A loss or a gradient that is not finite (exit code 4)."""

    exit_code = 4


class Stopped(XutrainError):
    """Stopped on request at a step boundary, with a checkpoint (exit code 75)."""

    exit_code = 75


class Failed(XutrainError):
    """The machine or another process failed: a dead rank, a full disk (exit code 1)."""

    exit_code = 1
