"""What pydantic found wrong -> sentences with a place, the rule and the nearest right value."""

from __future__ import annotations

import difflib
import json
import re
import typing
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from compressor.errors import RecipeError
from compressor.source import Location, Source, read_source, read_text
from compressor.types import Problem

Read = TypeVar("Read", bound=BaseModel)

_ROOT = "the recipe"

_KINDS = {
    "int_type": "an integer",
    "int_parsing": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "path_type": "a path",
    "none_required": "nothing",
}

_RANGES = {
    "greater_than_equal": "at least {ge}",
    "greater_than": "above {gt}",
    "less_than_equal": "at most {le}",
    "less_than": "below {lt}",
    "finite_number": "a finite number",
}


@dataclass(frozen=True)
class _Fault:
    """One error of pydantic's, with its location in the data as written."""

    error: ErrorDetails
    location: Location
    name: str

    @property
    def type(self) -> str:
        return self.error["type"]

    @property
    def context(self) -> dict[str, Any]:
        return dict(self.error.get("ctx", {}))


def diagnose(
    error: ValidationError, model: type[BaseModel], source: Source, *, root: str = _ROOT
) -> list[Problem]:
    """Translate a failed validation.

    Args:
        error: as raised by validating `source.data` against `model`.
        model: the outermost model; its fields tell which keys would have been known.
        source: where everything stands.
        root: what to call the outermost mapping.

    Returns:
        One problem per place, in the order of the file.
    """
    faults: dict[Location, list[_Fault]] = {}
    for details in error.errors(include_url=False):
        if _is_echo(details):
            continue
        fault = _locate(details, source.data)
        key = (*fault.location, fault.name) if fault.type == "missing" else fault.location
        faults.setdefault(key, []).append(fault)
    found = [_problem(group, model, source, root) for group in faults.values()]
    return sorted(found, key=lambda problem: (problem.line, problem.column))


def read_model(path: Path, model: type[Read], root: str) -> tuple[Read, Source]:
    """A small YAML file that a recipe names, such as a suite, and where everything in it stands.

    Args:
        path: of the file.
        model: what it holds.
        root: what to call it, such as `the suite`.

    Raises:
        RecipeError: it cannot be read or breaks a rule; carries every problem found.
    """
    source = read_source(read_text(path), str(path))
    try:
        return model.model_validate_json(json.dumps(source.data), strict=True), source
    except ValidationError as error:
        raise RecipeError(diagnose(error, model, source, root=root)) from None


def _is_echo(error: ErrorDetails) -> bool:
    """Pydantic counts only the valid entries of a list, so one bad entry makes it too short."""
    value, least = error["input"], error.get("ctx", {}).get("min_length", 0)
    return error["type"] == "too_short" and isinstance(value, list) and len(value) >= least


def _locate(error: ErrorDetails, data: Any) -> _Fault:
    """Drop the steps of pydantic's location that name a branch of a union, not a place."""
    steps = list(error["loc"])
    name = str(steps[-1]) if steps else ""
    if error["type"] == "missing":
        steps.pop()
    location: list[str | int] = []
    for step in steps:
        if isinstance(data, dict) and step in data:
            data = data[str(step)]
        elif isinstance(data, list | tuple) and isinstance(step, int):
            data = data[step]
        else:
            continue
        location.append(step)
    if error["type"] != "missing":
        name = str(location[-1]) if location else _ROOT
    return _Fault(error, tuple(location), name)


def _problem(group: Sequence[_Fault], model: type[BaseModel], source: Source, root: str) -> Problem:
    first = group[0]
    parent = first.location if first.type == "missing" else first.location[:-1]
    owner, where = _owner(parent, model, source.data, root)
    if first.type == "extra_forbidden":
        return _unknown_key(first, owner, where, source)
    if first.type == "missing":
        message = f"{where} needs the key {first.name!r}"
        return source.problem(first.location, message, _ask(f"{where}.{first.name}"))
    if first.type.startswith("union_tag"):
        return _wrong_tag(first, source)
    if first.type == "too_short":
        return source.problem(first.location, f"{first.name} in {where} needs at least one entry")
    if not first.location and root == _ROOT:
        message = f"a recipe is a mapping with `stages`, not {describe(source.data)}"
        return source.problem((), message, "compress show quickstart")
    name = f"entry {first.name}" if first.name.isdigit() else first.name
    message = _message(group, f"{name} in {where}" if parent else name)
    topic = f"{where}.{first.name}" if first.name in (owner.model_fields if owner else ()) else ""
    return source.problem(first.location, message, _ask(topic))


def _ask(topic: str) -> str:
    return f"compress explain {topic}" if topic and " " not in topic else ""


def _unknown_key(
    fault: _Fault, owner: type[BaseModel] | None, where: str, source: Source
) -> Problem:
    known = list(owner.model_fields) if owner else []
    near = nearest(fault.name, known)
    guess = f"; did you mean {near!r}?" if near else ""
    hint = _ask(f"{where}.{near}" if near else where) or f"known keys: {', '.join(known)}"
    if near and where == _ROOT:
        hint = _ask(near)
    message = f"unknown key {fault.name!r} in {where}{guess}"
    return source.problem(fault.location, message, hint, at_key=True)


def _wrong_tag(fault: _Fault, source: Source) -> Problem:
    """A stage or an export without a usable discriminator."""
    key = str(fault.context["discriminator"]).strip("'")
    if fault.type == "union_tag_not_found":
        message = f"an entry of {_list(fault)} needs the key {key!r}"
        return source.problem(fault.location, message, f"compress ls {key}s")
    allowed = re.findall(r"'([^']*)'", str(fault.context["expected_tags"]))
    written = str(fault.context["tag"])
    bare = {name.partition(".")[2]: name for name in allowed}
    near = nearest(written, [*allowed, *bare])
    guess = f"; did you mean {bare.get(near, near)!r}?" if near else ""
    hint = f"compress ls {key}s" if key == "method" else f"allowed: {', '.join(allowed)}"
    return source.problem((*fault.location, key), f"unknown {key} {written!r}{guess}", hint)


def _list(fault: _Fault) -> str:
    return str(fault.location[0]) if fault.location else _ROOT


def _message(group: Sequence[_Fault], subject: str) -> str:
    """One sentence for all branches of a union that refused a value."""
    for fault in group:  # a branch of the right type tells more than one of another type
        if rule := _RANGES.get(fault.type):
            bound = rule.format(**fault.context)
            return f"{subject} must be {bound}, not {describe(fault.error['input'])}"
    wanted = [text for fault in group if (text := _wanted(fault))]
    if len(wanted) < len(group):
        return f"{subject}: {_own_words(group)}"
    value = group[0].error["input"]
    options = [name for fault in group for name in _choices(fault)]
    near = nearest(value, options) if isinstance(value, str) else ""
    guess = f"; did you mean {near!r}?" if near else ""
    return f"{subject} must be {_either(wanted)}, not {describe(value)}{guess}"


def _own_words(group: Sequence[_Fault]) -> str:
    last = group[-1]
    raised = last.context.get("error")
    return str(raised) if raised else last.error["msg"][:1].lower() + last.error["msg"][1:]


def _wanted(fault: _Fault) -> str:
    if fault.type == "literal_error":
        return _either(
            [choice if choice.isdecimal() else repr(choice) for choice in _choices(fault)]
        )
    return _KINDS.get(fault.type, "")


def _choices(fault: _Fault) -> list[str]:
    expected = str(fault.context.get("expected", ""))
    return re.findall(r"'([^']*)'", expected) or re.findall(r"\d+", expected)


def _either(words: Sequence[str]) -> str:
    words = list(dict.fromkeys(words))
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def describe(value: Any) -> str:
    """A value as a person would name it."""
    if value is None:
        return "empty"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    return repr(value)


def nearest(word: str, known: Iterable[str]) -> str:
    """The known word closest to a misspelt one, or an empty string."""
    return next(iter(difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)), "")


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """The models that a type annotation mentions, in order."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in typing.get_args(annotation) for model in models_in(part)]


def _owner(
    location: Location, model: type[BaseModel], data: Any, root: str
) -> tuple[type[BaseModel] | None, str]:
    """The model that the mapping at a location is read into, and what to call it."""
    owner: type[BaseModel] | None = model
    where: list[str] = []
    annotation: Any = None
    for step in location:
        data = data[step]
        if isinstance(step, str):
            where.append(step)
            annotation = (
                owner.model_fields[step].annotation if owner and _has(owner, step) else None
            )
        owner = _branch(models_in(annotation), data)
        if owner and "method" in owner.model_fields and isinstance(step, int):
            where = [str(data["method"])]
    return owner, ".".join(where) or root


def _has(owner: type[BaseModel], field: str) -> bool:
    return field in owner.model_fields


def _branch(candidates: Sequence[type[BaseModel]], data: Any) -> type[BaseModel] | None:
    """The member of a union whose `method` default is the one written; else the only member."""
    if len(candidates) == 1:
        return candidates[0]
    written = data.get("method") if isinstance(data, dict) else None
    return next((c for c in candidates if c.model_fields["method"].default == written), None)
