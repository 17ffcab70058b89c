"""Every error a user can meet, and the exit code it leaves with.

    CompressorError                 1  a fault of ours, or of the run
    ├── VerificationError           1  a stage or an export broke one of its promises
    ├── NumericalError              1  numbers that no method can work with
    ├── UsageError                  2  the request cannot be carried out as written
    │   ├── RecipeError             2  the recipe breaks a rule (all problems at once)
    │   ├── PlanError               2  the chain cannot work on this model
    │   ├── ModelError              2  the model is missing, broken or of an unknown family
    │   ├── TextError               2  calibration or evaluation text is missing or unusable
    │   └── ResumeError             2  the run on disk is another one, or was changed
    ├── ResourceError               3  disk, memory, network or an optional package is missing
    ├── GateFailed                  4  a quality gate failed
    ├── GateInconclusive            5  the evidence does not decide a quality gate
    └── AccessError                 6  credentials or licence forbid it

An error carries one sentence saying what is wrong, where, and the rule; `hint` says
what would work. `cli` prints both and exits with `exit_code`; nothing else may.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from compressor.types import Problem


class CompressorError(Exception):
    """Base of all errors raised on purpose.

    Args:
        message: one sentence: what, where, the rule.
        hint: what would work instead, often a command to type.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  → {self.hint}" if self.hint else self.message


class VerificationError(CompressorError):
    """A stage or an export broke one of its promises; the run stays resumable."""


class NumericalError(CompressorError):
    """Numbers that no method can work with: NaN, infinity, statistics of no data."""


class UsageError(CompressorError):
    """The request cannot be carried out as written."""

    exit_code = 2


class _ProblemsError(UsageError):
    """Several problems reported together, each with its place in the recipe."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


class RecipeError(_ProblemsError):
    """The recipe breaks a rule; carries every problem found."""


class PlanError(_ProblemsError):
    """The chain cannot work on this model; carries every problem found."""


class ModelError(UsageError):
    """The model is missing, broken or of a family that we cannot walk."""


class TextError(UsageError):
    """Calibration or evaluation text is missing or unusable."""


class ResumeError(UsageError):
    """The run on disk belongs to another recipe, model or version, or was changed by hand."""


class ResourceError(CompressorError):
    """Disk, memory, network or an optional package is missing."""

    exit_code = 3


class GateFailed(CompressorError):
    """A quality gate failed."""

    exit_code = 4


class GateInconclusive(CompressorError):
    """The evidence does not decide a quality gate."""

    exit_code = 5


class AccessError(CompressorError):
    """Credentials or a licence forbid the action."""

    exit_code = 6


def guess(word: str, known: Iterable[str]) -> str:
    """The beginning of a hint: which known word was meant, if one is close."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"did you mean {close[0]!r}? " if close else ""
