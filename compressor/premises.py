"""What a recipe takes for granted, whatever the model: an order that works, text that exists."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from compressor import order
from compressor.calibration import CalibrationConfig, require_enough, require_origin
from compressor.errors import RecipeError, TextError, UsageError
from compressor.evaluation.config import EvaluateConfig
from compressor.evaluation.suites import load_suite
from compressor.source import Location
from compressor.text import has_text
from compressor.types import Problem

AtPlace = Callable[[Location, str, str], Problem]
"""Makes a problem of a place in the recipe, a message and a hint."""


def order_problems(methods: Sequence[str], problem: AtPlace) -> list[Problem]:
    """Stages that may not stand where they stand, by the methods of a recipe."""
    return [
        problem(("stages", found.index, "method"), found.message, found.hint)
        for found in order.order_problems(methods)
    ]


def text_problems(
    calibration: CalibrationConfig | None, evaluate: EvaluateConfig | None, problem: AtPlace
) -> list[Problem]:
    """Text that the sections name and that cannot do; None is a section that is not there."""
    found: list[Problem] = []
    if calibration is not None:
        origin = "mix" if calibration.source is None else "source"
        with _reported(("calibration", origin), problem, found):
            require_origin(calibration)
            with _reported(("calibration", "samples"), problem, found):
                require_enough(calibration)
    if evaluate is None:
        return found
    with _reported(("evaluate", "suite"), problem, found):
        load_suite(evaluate.suite)
    for domain, path in evaluate.text.items():
        with _reported(("evaluate", "text", domain), problem, found):
            _require_text(Path(path))
    return found


def _require_text(path: Path) -> None:
    if not path.is_file():
        raise TextError(f"no file {path}")
    if not has_text(path):
        raise TextError(f"{path} holds no text")


@contextmanager
def _reported(place: Location, problem: AtPlace, found: list[Problem]) -> Iterator[None]:
    """Within the block, a usage error is a problem at a place of the recipe."""
    try:
        yield
    except RecipeError as error:  # a file that the recipe names has places of its own
        found += error.problems
    except UsageError as error:
        found.append(problem(place, error.message, error.hint))
