"""What `compress explain` says: every key of a recipe, its default, its effect, its source.

The words are those of the configuration classes, so that they cannot disagree with the code.
"""

from __future__ import annotations

import inspect
import re
import types
import typing
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from compressor.diagnose import models_in, nearest
from compressor.errors import UsageError
from compressor.recipe import recipe_model
from compressor.registry import methods, registry
from compressor.stages.base import StageConfig


class Option(BaseModel):
    """One key: what it is, what it accepts, what happens when it is left out."""

    model_config = ConfigDict(frozen=True)

    name: str
    accepts: str
    default: str
    what: str
    effect: str = ""
    source: str = ""


class Topic(BaseModel):
    """A method or a section of a recipe with its keys, or a single key."""

    model_config = ConfigDict(frozen=True)

    name: str
    summary: str
    source: str = ""
    options: tuple[Option, ...] = ()


def explain(topic: str) -> Topic:
    """Describe `METHOD`, `METHOD.option`, `SECTION` or `SECTION.key`; "" lists them all.

    A place of a recipe, such as `stages.0.group_size` or `export.0.format`, stands for its key:
    in a stage, whose method is not known, for that of every method.

    Raises:
        UsageError: there is no such topic; names the nearest.
    """
    topic = re.sub(r"\.\d+(?=\.|$)", "", topic)
    if not topic or topic in {"recipe", "stages"}:
        return _overview()
    owners = _owners()
    owner, _, key = topic.rpartition(".")
    if topic in owners and owner not in owners:
        return _describe(topic, owners[topic])
    if owner == "stages" and (option := _of_stages(key)):
        return Topic(name=topic, summary="A key of a stage.", options=option)
    if owner in owners and key in owners[owner].model_fields:
        full = _describe(owner, owners[owner])
        only = tuple(option for option in full.options if option.name == key)
        return Topic(name=topic, summary=full.summary, source=full.source, options=only)
    if not owner and key in recipe_model().model_fields:
        field = recipe_model().model_fields[key]
        return Topic(name=key, summary="A key of the recipe.", options=(_option(key, field, {}),))
    raise _unknown(topic, owners)


def _owners() -> dict[str, type[BaseModel]]:
    """Methods and sections by name, each with the class that reads it."""
    found: dict[str, type[BaseModel]] = {m.name: registry().get(m.name) for m in methods()}
    for name, method in list(found.items()):
        for key, field in method.model_fields.items():
            found |= {f"{name}.{key}": inside for inside in models_in(field.annotation)}
    for name, field in recipe_model().model_fields.items():
        if name != "stages" and (inside := models_in(field.annotation)):
            found[name] = inside[0]
    return found


def _of_stages(key: str) -> tuple[Option, ...]:
    """An option as every method that has it describes it; the same words once."""
    described = {
        option.model_copy(update={"name": key}): f"{method.name}.{key}"
        for method in methods()
        for option in _describe(method.name, registry().get(method.name)).options
        if option.name == key
    }
    if len(described) == 1:
        return tuple(described)
    return tuple(option.model_copy(update={"name": name}) for option, name in described.items())


def topics() -> list[str]:
    """Everything that can be explained, sorted."""
    owners = _owners()
    keys = {f"{owner}.{key}" for owner, model in owners.items() for key in model.model_fields}
    return sorted(keys | set(owners) | set(recipe_model().model_fields))


def _unknown(topic: str, owners: dict[str, type[BaseModel]]) -> UsageError:
    bare = {name.partition(".")[2]: name for name in owners if "." in name}
    near = nearest(topic, [*topics(), *bare])
    guess = f"; did you mean {bare.get(near, near)!r}?" if near else ""
    return UsageError(f"nothing to explain under {topic!r}{guess}", "compress explain lists topics")


def _overview() -> Topic:
    keys = tuple(_option(name, field, {}) for name, field in recipe_model().model_fields.items())
    stages = tuple(
        Option(name=m.name, accepts="a stage", default="", what=m.summary) for m in methods()
    )
    return Topic(name="recipe", summary="Keys of a recipe, then methods.", options=keys + stages)


def _describe(name: str, model: type[BaseModel]) -> Topic:
    documented = _attributes(model)
    options = [
        _option(key, field, documented)
        for key, field in model.model_fields.items()
        if key != "method"
    ]
    source = model.source if issubclass(model, StageConfig) else ""
    summary = (inspect.getdoc(model) or "").partition("\n")[0]
    return Topic(name=name, summary=summary, source=source, options=tuple(options))


def _option(name: str, field: FieldInfo, documented: dict[str, str]) -> Option:
    extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
    return Option(
        name=name,
        accepts=accepts(field),
        default=_default(field),
        what=field.description or documented.get(name, ""),
        effect=str(extra.get("effect", "")),
        source=str(extra.get("source", "")),
    )


def _attributes(model: type[BaseModel]) -> dict[str, str]:
    """The `Attributes:` of a docstring, name -> text, for classes documented there."""
    text = (inspect.getdoc(model) or "").partition("Attributes:\n")[2]
    entries = re.findall(r"^    (\w[\w, ]*): (.+(?:\n {8}.+)*)", text, flags=re.MULTILINE)
    return {
        name: re.sub(r"\s+", " ", words) for names, words in entries for name in names.split(", ")
    }


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined:
        return "none: must be written"
    if isinstance(value, BaseModel):
        return "see its keys"
    if isinstance(value, tuple):
        return f"[{', '.join(map(_word, value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if value not in (None, "", {}) else "empty"


def _word(value: object) -> str:
    """An entry of a list; of a section, what tells it from others of its kind."""
    return str(next(iter(value.model_dump().values())) if isinstance(value, BaseModel) else value)


def accepts(field: FieldInfo) -> str:
    """The type of a field in words, with its bounds."""
    bounds = [text for rule in field.metadata if (text := _bound(rule))]
    return ", ".join([_kind(field.annotation), *bounds])


def _bound(rule: object) -> str:
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    found = [f"{word} {getattr(rule, key)}" for key, word in words.items() if hasattr(rule, key)]
    return found[0] if found else ""


def _kind(annotation: Any) -> str:
    names = {int: "integer", float: "number", bool: "true or false", str: "text"}
    if annotation in names:
        return names[annotation]
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return " | ".join(str(choice) for choice in arguments)
    if origin is typing.Annotated:
        bounds = [text for rule in arguments[1:] for text in _bounds_of(rule)]
        return ", ".join([_kind(arguments[0]), *bounds])
    if origin in {typing.Union, types.UnionType}:
        return " | ".join(_kind(part) for part in arguments if part is not type(None))
    if origin is tuple:
        return f"list of {_kind(arguments[0])}"
    return "mapping"


def _bounds_of(rule: object) -> list[str]:
    rules = rule.metadata if isinstance(rule, FieldInfo) else [rule]
    return [text for entry in rules if (text := _bound(entry))]
