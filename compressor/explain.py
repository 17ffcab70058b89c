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
from compressor.registry import FAMILIES, methods, registry
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
    """Describe `FAMILY`, `METHOD`, `METHOD.option`, `SECTION` or `SECTION.key`; "" lists them all.

    A place of a recipe, such as `stages.0.group_size` or `export.0.format`, stands for its key:
    in a stage, whose method is not known, for that of every method. So does a key alone, such as
    `target_bpw`, and a method without its family for the method.

    Raises:
        UsageError: there is no such topic; names the nearest.
    """
    topic = re.sub(r"\.\d+(?=\.|$)", "", topic)
    owners = _owners()
    found = _whole(topic, owners) or _part(topic, owners)
    if found is None:
        raise _unknown(topic, owners)
    return found


def _whole(topic: str, owners: dict[str, type[BaseModel]]) -> Topic | None:
    """The recipe, a family, a method or a section."""
    if not topic or topic in {"recipe", "stages"}:
        return _overview()
    if topic in FAMILIES:
        return Topic(name=topic, summary=f"{FAMILIES[topic]}.", options=_stages(topic))
    inside = topic.rpartition(".")[0] in owners
    return _describe(topic, owners[topic]) if topic in owners and not inside else None


def _part(topic: str, owners: dict[str, type[BaseModel]]) -> Topic | None:
    """A key of stages, of a method or a section, or of the recipe; or a word without its owner."""
    owner, _, key = topic.rpartition(".")
    if owner == "stages":
        found = _keys(key, {method.name: owners[method.name] for method in methods()})
        return Topic(name=topic, summary="A key of a stage.", options=found) if found else None
    if owner in owners and key in owners[owner].model_fields:
        full = _describe(owner, owners[owner])
        only = tuple(option for option in full.options if option.name == key)
        return Topic(name=topic, summary=full.summary, source=full.source, options=only)
    if not owner and key in recipe_model().model_fields:
        field = recipe_model().model_fields[key]
        return Topic(name=key, summary="A key of the recipe.", options=(_option(key, field, {}),))
    return None if owner else _bare(key, owners)


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


def _bare(word: str, owners: dict[str, type[BaseModel]]) -> Topic | None:
    """What a word stands for without what it belongs to: keys, or methods, or both."""
    named = [method.name for method in methods() if method.name.partition(".")[2] == word]
    keys = _keys(word, owners)
    if not keys:
        return _describe(named[0], owners[named[0]]) if len(named) == 1 else None
    homes = ", ".join(name for name, model in owners.items() if word in model.model_fields)
    stages = tuple(option for option in _stages() if option.name in named)
    return Topic(name=word, summary=f"A key of {homes}.", options=stages + keys)


def _keys(key: str, owners: dict[str, type[BaseModel]]) -> tuple[Option, ...]:
    """A key as every owner that has it describes it; the same words once."""
    described = {
        option.model_copy(update={"name": key}): f"{owner}.{key}"
        for owner, model in owners.items()
        for option in _describe(owner, model).options
        if option.name == key
    }
    if len(described) == 1:
        return tuple(described)
    return tuple(option.model_copy(update={"name": name}) for option, name in described.items())


def _stages(family: str = "") -> tuple[Option, ...]:
    """The methods of a family, or all, each with its summary."""
    return tuple(
        Option(name=method.name, accepts="a stage", default="", what=method.summary)
        for method in methods()
        if family in ("", method.family)
    )


def topics() -> list[str]:
    """Everything that can be explained, sorted."""
    owners = _owners()
    keys = {f"{owner}.{key}" for owner, model in owners.items() for key in model.model_fields}
    return sorted(keys | {*owners, *recipe_model().model_fields, *FAMILIES})


def _unknown(topic: str, owners: dict[str, type[BaseModel]]) -> UsageError:
    bare = {name.partition(".")[2]: name for name in owners if "." in name}
    keys = {key for model in owners.values() for key in model.model_fields}
    near = nearest(topic, [*topics(), *bare, *sorted(keys)])
    guess = f"; did you mean {bare.get(near, near)!r}?" if near else ""
    return UsageError(f"nothing to explain under {topic!r}{guess}", "compress explain lists topics")


def _overview() -> Topic:
    keys = tuple(_option(name, field, {}) for name, field in recipe_model().model_fields.items())
    return Topic(name="recipe", summary="Keys of a recipe, then methods.", options=keys + _stages())


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
        kinds = (_kind(part) for part in arguments if part is not type(None))
        return " | ".join(dict.fromkeys(kinds))
    if origin is tuple:
        return f"list of {_kind(arguments[0])}"
    return _mapping(annotation)


def _mapping(annotation: Any) -> str:
    if arguments := typing.get_args(annotation):
        return f"mapping of {_kind(arguments[0])} to {_kind(arguments[1])}"
    if issubclass(annotation, StageConfig):
        return "stage"
    return f"mapping of {', '.join(annotation.model_fields)}"


def _bounds_of(rule: object) -> list[str]:
    rules = rule.metadata if isinstance(rule, FieldInfo) else [rule]
    return [text for entry in rules if (text := _bound(entry))]
