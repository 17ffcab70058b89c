"""Deliverables of a recipe that a format cannot hold, or an engine would not load."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from typing import get_args

from compressor.cost import dense_outer
from compressor.errors import ResourceError
from compressor.formats import llama_quantize
from compressor.formats.capabilities import ENVIRONMENTS, PACKAGES
from compressor.formats.exchange import GGUF_BLOCK, container_problems
from compressor.formats.support import Target, cache_problems, engine_problems, first_of
from compressor.model.architecture import Architecture
from compressor.programs import PROGRAMS
from compressor.recipe import Recipe
from compressor.sections import EngineName, ExportConfig, ExportFormat
from compressor.stages.packing import targets_of
from compressor.types import Problem

# Formats for quantized weights only.
_PACKED = ("compressed-tensors", "gptq", "awq", "bitsandbytes")


def _possible(recipe: Recipe, final: Architecture) -> Iterator[Architecture]:
    """What the run may come to: the plan's example, and every grid that a stage may choose."""
    yield final
    for stage in recipe.stages:
        yield from stage.alternatives(final)


def export_problems(recipe: Recipe, final: Architecture, *, settled: bool = True) -> list[Problem]:
    """Deliverables that a format cannot hold or an engine would not load.

    Args:
        recipe: whose exports they are.
        final: what the last stage leaves.
        settled: whether the stages are in order. Else only what is wrong with any grid is told:
            what nothing here writes, what does not know the family, what an engine does not read.
    """
    possible: list[Sequence[Target]] = [[]]
    if settled:
        possible = [targets_of(one) for one in _possible(recipe, final)]
    found = []
    for index, export in enumerate(recipe.export):
        if settled and export.format not in _serving(final):
            found.append(_forgotten_inputs(recipe, index, final))
            continue
        if settled:
            found += _cache_problems(recipe, index, final)
            found += _nothing_packed(recipe, index, final)
            found += _embedding_problems(recipe, index, final)
        found += _unheld(recipe, index, possible, final.model_type)
        found += _unwritten(recipe, index)
        for engine in export.engines:
            if message := first_of(_unloadable(engine, possible, export, final)):
                hint = f"change the stage, or take {engine} out of `engines`"
                found.append(recipe.problem(("export", index, "engines"), message, hint))
    return found or _unserved(recipe, possible, final)


def _nothing_packed(recipe: Recipe, index: int, final: Architecture) -> list[Problem]:
    """A format for quantized weights, of which there are none."""
    export = recipe.export[index]
    dense = all(target.scheme is None for target in targets_of(final)) and final.cache is None
    if export.format not in _PACKED or not dense:
        return []
    message = f"nothing is quantized, so there is nothing to pack as {export.format}"
    hint = "add a quantize stage, or export `dense`"
    return [recipe.problem(("export", index, "format"), message, hint)]


def _unheld(
    recipe: Recipe, index: int, possible: Sequence[Sequence[Target]], model_type: str
) -> list[Problem]:
    """Grids that a format does not hold, or a family that it does not know."""
    container = recipe.export[index].container
    sentences = [
        sentence for one in possible for sentence in container_problems(one, container, model_type)
    ]
    message = first_of(list(dict.fromkeys(sentences)))
    hint = _HINTS.get(container, "change the stage, or export `dense`")
    return [recipe.problem(("export", index, "format"), message, hint)] if message else []


def _unwritten(recipe: Recipe, index: int) -> list[Problem]:
    """Packages and programs that have to write the export, and are not there."""
    found = _second_quantizer(recipe, index) + _missing_environment(recipe, index)
    export = recipe.export[index]
    package = PACKAGES.get(export.format)
    if package and find_spec(package) is None:
        message = f"{export.format} export needs the package {package}, which is not installed"
        found.append(recipe.problem(("export", index, "format"), message, f"pip install {package}"))
    return found


def _unloadable(
    engine: EngineName,
    possible: Sequence[Sequence[Target]],
    export: ExportConfig,
    final: Architecture,
) -> list[str]:
    """Why an engine would not load a deliverable."""
    problems = (engine_problems(engine, one, export.container, final.cache) for one in possible)
    return list(dict.fromkeys(sentence for one in problems for sentence in one))


def _unserved(
    recipe: Recipe, possible: Sequence[Sequence[Target]], final: Architecture
) -> list[Problem]:
    """Engines that the recipe names and that would load none of its deliverables."""
    found = []
    for engine in recipe.engines:
        reasons = {
            export.name: _unloadable(engine, possible, export, final) for export in recipe.export
        }
        if all(reasons.values()):
            told = "; ".join(f"{name}: {why[0]}" for name, why in reasons.items())
            message = f"{engine} would load none of the deliverables ({told or 'there are none'})"
            hint = f"add one that it loads (compress ls engines), or take {engine} out of `engines`"
            found.append(recipe.problem(("engines",), message, hint))
    return found


_HINTS: Mapping[str, str] = {
    "llama-quantize": "leave `type` out and the codes go into the file as they are, or leave the "
    "rounding to the quantizer",
}


def _second_quantizer(recipe: Recipe, index: int) -> list[Problem]:
    """An export that llama.cpp's quantizer writes, where there is none."""
    if recipe.export[index].type is None or llama_quantize.find_program() is not None:
        return []
    message, hint = llama_quantize.missing(), llama_quantize.HINT
    return [recipe.problem(("export", index, "type"), message, hint)]


def _embedding_problems(recipe: Recipe, index: int, final: Architecture) -> list[Problem]:
    """An embedding that the export is to round, and cannot."""
    kind, dense = recipe.export[index].blocks, dense_outer(final)
    if kind is None:
        return []
    message = ""
    if not dense:
        message = "the chain has rounded the embedding, so that nothing is left to round"
    elif wide := [matrix for matrix in dense if matrix.shape[1] % GGUF_BLOCK]:
        message = (
            f"{wide[0].name} has {wide[0].shape[1]} inputs; blocks of {kind} have {GGUF_BLOCK}"
        )
    hint = "leave `embedding` out"
    return [recipe.problem(("export", index, "embedding"), message, hint)] if message else []


def _missing_environment(recipe: Recipe, index: int) -> list[Problem]:
    """A program that has to write the format, and is not there."""
    form = recipe.export[index].format
    if form not in ENVIRONMENTS:
        return []
    try:
        PROGRAMS[ENVIRONMENTS[form]].find()
    except ResourceError as error:
        message = f"{form} export needs another program: {error.message}"
        return [recipe.problem(("export", index, "format"), message, error.hint)]
    return []


def _cache_problems(recipe: Recipe, index: int, final: Architecture) -> list[Problem]:
    """A rounded cache that a format does not take."""
    if final.cache is None:
        return []
    container = recipe.export[index].container
    possible = [targets_of(one) for one in _possible(recipe, final)]
    problems = (cache_problems(one, container, final.cache) for one in possible)
    return [
        recipe.problem(
            ("export", index, "format"), message, "leave quantize.kv out, or change this"
        )
        for message in dict.fromkeys(sentence for one in problems for sentence in one)
    ]


def _serving(final: Architecture) -> Sequence[str]:
    """The formats that can say how the model's inputs are rounded."""
    numbers = {scheme.number for scheme in final.activations.values()}
    if not numbers:
        return get_args(ExportFormat)
    return ("bitsandbytes",) if numbers == {"absmax"} else ("compressed-tensors",)


def _forgotten_inputs(recipe: Recipe, index: int, final: Architecture) -> Problem:
    """A format that holds weights only would be served otherwise than it was measured."""
    name, scheme = next(iter(final.activations.items()))
    message = (
        f"{recipe.export[index].format} cannot say that inputs are rounded ({name}, to "
        f"{scheme.name}), so that it would not give what is measured"
    )
    (right,) = _serving(final)
    hint = f"export {right}, or do not round inputs"
    return recipe.problem(("export", index, "format"), message, hint)
