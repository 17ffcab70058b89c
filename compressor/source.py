"""YAML text -> plain values that remember where each of them stands.

Whatever is wrong with a value later, `Source.problem` turns its location in the data, such as
("stages", 0, "bits"), into file, line and column, or into the `--set` that wrote it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq, TaggedScalar
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.scalarbool import ScalarBoolean

from compressor.errors import RecipeError
from compressor.types import Problem

Location = tuple[str | int, ...]

_MAX_BYTES = 1 << 20
_MAX_VALUES = 20_000
_MAX_DEPTH = 50
_TOO_DEEP = f"nested deeper than {_MAX_DEPTH} levels; this is no recipe"


class _Refused(Exception):
    """A construct of YAML that a recipe does not use; carries its place."""

    def __init__(self, message: str, place: tuple[int, int]) -> None:
        super().__init__(message)
        self.message, self.place = message, place


@dataclass(frozen=True)
class Source:
    """A recipe as written.

    Attributes:
        file: name shown in messages.
        text: verbatim.
        data: mappings, lists, strings, numbers, booleans and None only.
        keys: line and column (from 1) of the key, or of the dash, that introduces a value.
        values: line and column (from 1) of the value itself.
        overrides: locations written by `--set`, as `--set dotted.path`.
    """

    file: str
    text: str
    data: Any
    keys: dict[Location, tuple[int, int]]
    values: dict[Location, tuple[int, int]]
    overrides: dict[Location, str]

    def overridden(self, location: Location) -> str:
        """The `--set` that wrote the value at a location or around it, or an empty string."""
        for end in range(len(location), 0, -1):
            if option := self.overrides.get(location[:end]):
                return option
        within = (text for at, text in self.overrides.items() if at[: len(location)] == location)
        return "" if location in self.values else next(within, "")

    def problem(
        self, location: Location, message: str, hint: str = "", *, at_key: bool = False
    ) -> Problem:
        """A problem at a location, or at the nearest enclosing one that the file holds.

        Args:
            location: keys and list indices from the top.
            message: what is wrong.
            hint: what would work.
            at_key: point at the key rather than at its value.
        """
        if option := self.overridden(location):
            return Problem(f"{option}: {message}", hint=hint)
        table = self.keys if at_key else self.values
        while location not in table and location:
            location, table = location[:-1], self.values
        line, column = table.get(location, (1, 1))
        return Problem(message, self.file, line, column, hint)


def read_source(
    text: str, file: str, overrides: Sequence[str] = (), *, option: str = "--set"
) -> Source:
    """Parse a recipe and apply `--set` options.

    Args:
        text: YAML 1.2.
        file: name for messages.
        overrides: `dotted.path=value`, the value written as YAML.
        option: the command line's name for such an override.

    Raises:
        RecipeError: no valid YAML, a duplicate key, a construct outside plain data, a bad option.
    """
    document = _parse(text, file)
    reader = _Reader()
    try:
        data = reader.plain(document, (), (1, 1))
    except _Refused as refused:
        raise RecipeError([Problem(refused.message, file, *refused.place)]) from None
    source = Source(file, text, data, reader.keys, reader.values, {})
    apply_overrides(source, overrides, option)
    return source


def _parse(text: str, file: str) -> Any:
    if len(text) > _MAX_BYTES:
        raise RecipeError([Problem(f"{file} is larger than 1 MiB; this is no recipe")])
    try:
        return YAML(typ="rt").load(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
        message, hint = _syntax(str(error.problem or error.context))
        raise RecipeError([Problem(message, file, line, column, hint)]) from None
    except YAMLError as error:
        message = str(error).partition("\n")[0]
        raise RecipeError([Problem(f"not valid YAML: {message}", file, 1, 1)]) from None
    except RecursionError:
        raise RecipeError([Problem(_TOO_DEEP, file, 1, 1)]) from None
    except ValueError:
        message = "a number has thousands of digits; this is no recipe"
        raise RecipeError([Problem(message, file, 1, 1)]) from None


def _syntax(problem: str) -> tuple[str, str]:
    """The parser's complaint in the words of a recipe's author."""
    problem = " ".join(problem.split())
    if problem.startswith("found duplicate key"):
        key = problem.split('"')[1]
        return f"the key {key!r} stands twice in one mapping", "keep one of the two"
    if "'\\t'" in problem:
        return "a tab stands where YAML allows spaces only", "replace it by spaces"
    return f"not valid YAML: {problem}", ""


class _Reader:
    """Turns the parser's tree into plain values and notes where each stands."""

    def __init__(self) -> None:
        self.keys: dict[Location, tuple[int, int]] = {}
        self.values: dict[Location, tuple[int, int]] = {}
        self._open: list[int] = []

    def plain(self, node: Any, location: Location, place: tuple[int, int]) -> Any:
        self.values[location] = place
        if len(self.values) > _MAX_VALUES:
            raise _Refused(f"more than {_MAX_VALUES} values; this is no recipe", place)
        if len(location) > _MAX_DEPTH:
            raise _Refused(_TOO_DEEP, place)
        if isinstance(node, TaggedScalar) or getattr(getattr(node, "tag", None), "value", None):
            raise _Refused("YAML tags (`!name`) are not used in recipes", place)
        if isinstance(node, CommentedMap | CommentedSeq):
            return self._collection(node, location, place)
        return _scalar(node, place)

    def _collection(
        self, node: CommentedMap | CommentedSeq, location: Location, place: tuple[int, int]
    ) -> Any:
        if id(node) in self._open:
            raise _Refused("an alias refers to a value that contains it", place)
        self._open.append(id(node))
        try:
            if isinstance(node, CommentedMap):
                return self._mapping(node, location, place)
            return [
                self.plain(item, (*location, index), _from_one(node.lc.item(index)))
                for index, item in enumerate(node)
            ]
        finally:
            self._open.pop()

    def _mapping(
        self, node: CommentedMap, location: Location, place: tuple[int, int]
    ) -> dict[str, Any]:
        result = {}
        for key, value in node.items():
            at, key_place = place, place
            if key in (node.lc.data or {}):  # a merged key has no place of its own
                key_place = _from_one(node.lc.key(key))
                # An empty value has no place: the parser puts it where the next thing stands.
                at = key_place if value is None else _from_one(node.lc.value(key))
            if not isinstance(key, str):
                raise _Refused(f"the key {key!r} is not text; quote it", key_place)
            self.keys[(*location, key)] = key_place
            result[str(key)] = self.plain(value, (*location, str(key)), at)
        return result


def _from_one(place: tuple[int, int]) -> tuple[int, int]:
    return place[0] + 1, place[1] + 1


def _scalar(node: Any, place: tuple[int, int]) -> Any:
    """A plain Python value; the parser's own classes remember formatting, which we drop."""
    if node is None or isinstance(node, bool):
        return node
    if isinstance(node, ScalarBoolean):  # a boolean with an anchor, by itself an integer
        return bool(node)
    for kind in (int, float, str):
        if isinstance(node, kind):
            return kind(node)
    raise _Refused(f"{node} is read as a {type(node).__name__}; quote it to mean text", place)


def apply_overrides(source: Source, overrides: Sequence[str], option: str = "--set") -> None:
    """Write options `dotted.path=value` into the data of a source, in place.

    Raises:
        RecipeError: carries every option that cannot be written.
    """
    problems = [found for text in overrides if (found := _override(source, text, option))]
    if problems:
        raise RecipeError(problems)


def _override(source: Source, text: str, name: str) -> Problem | None:
    """Write one `--set` into the data; says what is wrong with it, if anything is."""
    dotted, equals, written = text.partition("=")
    option = f"{name} {dotted}"
    if not equals or not dotted:
        return Problem(f"{name} {text}: not of the form dotted.path=value")
    try:
        value = _Reader().plain(YAML(typ="rt").load(written), (), (1, 1))
    except (YAMLError, _Refused, ValueError, RecursionError):
        return Problem(f"{option}: {_shortened(written)!r} is not valid YAML")
    steps: Location = tuple(map(_step, dotted.split(".")))
    lost = next((how for at, how in source.overrides.items() if at[: len(steps)] == steps), "")
    if lost:
        if lost == option:
            return Problem(f"{option}: given twice", hint="give it once")
        return Problem(f"{option}: it replaces what {lost} wrote", hint="give the wider one first")
    if fault := _write(source.data, steps, value):
        return Problem(f"{option}: {fault}")
    source.overrides[steps] = option
    return None


def _step(text: str) -> str | int:
    """A key, or the place in a list."""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else text


def _shortened(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."


def _write(data: Any, steps: Location, value: Any) -> str:
    """Set the value that `steps` lead to, creating mappings on the way; returns what is wrong."""
    for depth, step in enumerate(steps):
        here = ".".join(map(str, steps[:depth])) or "the recipe"
        if isinstance(data, list):
            if not isinstance(step, int) or step >= len(data):
                return f"{here} is a list of {len(data)}; entries are 0 to {len(data) - 1}"
        elif not isinstance(data, dict) or isinstance(step, int):
            return f"{here} has nothing named {step}"
        if depth == len(steps) - 1:
            data[step] = value
        elif isinstance(data, dict):
            data = data.setdefault(str(step), {})
        else:
            data = data[int(step)]
    return ""


def read_text(path: Path) -> str:
    """The text of a recipe file.

    Raises:
        RecipeError: it cannot be read or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise RecipeError([Problem(f"cannot read {path}: {error.strerror}")]) from None
    except UnicodeDecodeError as error:
        place = f"byte {error.start}"
        raise RecipeError([Problem(f"{path} is not UTF-8 text ({place})")]) from None
