"""Options and checks that every rounder of weights shares."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol, Self

from pydantic import model_validator

from compressor.stages.base import ReportProblem, StageConfig, option, patterns_option
from compressor.stages.overrides import GroupSize, Override, group_of, is_idle, overridden
from compressor.stages.weight_formats import (
    FORMATS,
    fixed_by,
    float_label,
    format_problems,
    inputs_of,
)
from compressor.types import ActivationScheme, Symmetry, WeightScheme

if TYPE_CHECKING:
    from compressor.model.architecture import Architecture
    from compressor.model.matrices import Matrix, Selection

__all__ = ["GroupSize", "RounderConfig"]


class RounderConfig(StageConfig):
    """Options common to the methods that round weights to integer codes."""

    rounds_weights: ClassVar[bool] = True

    weights: Literal["int", "fp8", "fp8-block", "mxfp4", "nvfp4"] = option(
        "int",
        "What weights become: `int`, integers of `bits`; `fp8` (e4m3) with a scale per output "
        "channel, or per block of 128 x 128; `mxfp4`, 4-bit floats in groups of 32 with powers of "
        "two as scales; `nvfp4`, in groups of 16 with fp8 scales.",
        effect="A float format fixes `bits`, `group_size` and `symmetry`. fp8 is close to lossless "
        "and runs on Hopper, Ada and newer; nvfp4 is more accurate than mxfp4 and costs a quarter "
        "of a bit more; rounded to nearest it was also nearer to SmolLM2-135M than integers in "
        "groups of 32, which take the same bits.",
        source="OCP Microscaling Formats 1.0; OCP 8-bit Floating Point 1.0",
    )
    bits: int = option(
        4,
        "Width of one code.",
        effect="Each bit fewer saves 1/16 of a bf16 matrix. 8 is close to lossless, 4 costs about "
        "1 %, 3 needs compensation, 2 is rarely usable without learned rounding.",
        ge=2,
        le=8,
    )
    group_size: GroupSize = option(
        128,
        "Inputs that share one scale, or `channel` for one scale per output channel.",
        effect="Smaller groups are more accurate and cost 16/group_size bits per weight. Must "
        "divide the input width of every target.",
    )
    symmetry: Symmetry = option(
        "symmetric",
        "Where the grid lies: `symmetric` about zero; `full_range`, the same with a signed scale "
        "so that the largest weight uses the extra negative code; `asymmetric`, with a zero-point.",
        effect="`asymmetric` helps most at 2 and 3 bits and adds bits/group_size per weight; "
        "`full_range` gains about as much without zero-points.",
    )
    activations: Literal["none", "int8", "fp8"] = option(
        "none",
        "What the inputs of the targets are rounded to while the model runs, with one scale for "
        "each token, found on the spot: `int8` beside integer weights, `fp8` beside fp8 weights "
        "(beside blocks with one scale for each 128 inputs of a token).",
        effect="Engines multiply 8-bit weights and inputs faster than 16-bit ones where they are "
        "bound by arithmetic (long prompts, large batches), at some accuracy. What is measured, "
        "and what GPTQ calibrates on, are rounded inputs.",
        source="LLM.int8, arXiv:2208.07339; ZeroQuant, arXiv:2206.01861",
    )
    targets: tuple[str, ...] = patterns_option(
        ("linear",),
        "Matrices to round: `linear` for all of the decoder blocks, `attention`, `mlp`, a role "
        "(`q`, `down`, …), a glob over names, or `re:` and a regular expression.",
        min_length=1,
    )
    ignore: tuple[str, ...] = patterns_option(
        (),
        "Matrices to leave alone, written like `targets`; wins over them.",
    )
    embeddings: Literal["keep", "quantize"] = option(
        "keep",
        "Whether the input embedding is rounded to nearest as well. Where allocate.bits gave it a "
        "grid, it is.",
        effect="In small models the embedding is a large share of the bytes.",
    )
    head: Literal["keep", "quantize"] = option(
        "keep",
        "Whether the output head is rounded as well. Where allocate.bits gave it a grid, it is.",
        effect="The head is sensitive: 8 bits are safe, 4 usually are not.",
    )
    embedding_bits: int = option(
        8,
        "Width of one code in the embedding and the head, when they are quantized.",
        effect="Independent of `bits`, because these matrices suffer more from rounding.",
        ge=2,
        le=8,
    )
    overrides: tuple[Override, ...] = option(
        (),
        "Other grids for some of the matrices: a list of entries with a `pattern`, written like "
        "`targets`, and any of `bits`, `group_size` and `symmetry`. Where several match, the last "
        "one wins.",
        effect="A pattern that matches nothing the stage rounds is an error. vLLM and SGLang fuse "
        "q, k and v, and gate and up, which must then agree.",
    )
    force: bool = option(
        False,
        "Run a setting that is known to ruin models.",
        effect="Needed for 2 bits without compensation.",
    )

    @model_validator(mode="after")
    def _take_what_the_format_fixes(self) -> Self:
        """Defaults become the format's values; what is written stays, for the plan to judge."""
        fixed = fixed_by(self.weights).items()
        vars(self).update({k: v for k, v in fixed if k not in self.model_fields_set})
        return self

    @property
    def label(self) -> str:
        """Such as `GPTQ W4 g64`."""
        method = self.method.rpartition(".")[2].upper()
        mixed = " with overrides" if self.overrides else ""
        return f"{method} {grid_label(self.scheme, self.activation_scheme)}{mixed}"

    @property
    def activation_scheme(self) -> ActivationScheme | None:
        """How the inputs of the targeted linear layers are rounded; None when they are not."""
        return inputs_of(self.weights).get(self.activations)

    @property
    def width_multiple(self) -> int:
        """Groups, also those of overrides, must divide the inputs of matrices."""
        sizes = [self.group_size, *(override.group_size for override in self.overrides)]
        return math.lcm(*(size for size in sizes if isinstance(size, int)))

    @property
    def scheme(self) -> WeightScheme:
        """The grid of the targeted linear layers."""
        if self.weights in FORMATS:
            return FORMATS[self.weights].scheme
        return self._scheme(self.bits)

    @property
    def embedding_scheme(self) -> WeightScheme:
        """The grid of the embedding and the head: integers, by channel beside a float format."""
        if self.weights in FORMATS:
            return WeightScheme(self.embedding_bits, None)
        return self._scheme(self.embedding_bits)

    def _scheme(self, bits: int) -> WeightScheme:
        return WeightScheme(bits, group_of(self.group_size), self.symmetry)

    def schemes(self, architecture: Architecture) -> dict[str, WeightScheme]:
        """The grid of every matrix that the stage rounds, by name, in model order."""
        ignored = {matrix.name for matrix in architecture.select(self.ignore).matrices}
        chosen = {
            matrix.name: matrix.allotted or self.scheme
            for matrix in architecture.select(self.targets).matrices
            if matrix.name not in ignored
        }
        for role, choice in (("embed", self.embeddings), ("head", self.head)):
            chosen |= {
                matrix.name: matrix.allotted or self.embedding_scheme
                for matrix in architecture.matrices
                if matrix.role == role
                and matrix.name not in ignored
                and (matrix.allotted or choice == "quantize")
            }
        ordered = {m.name: chosen[m.name] for m in architecture.matrices if m.name in chosen}
        return overridden(ordered, self.overrides, architecture)

    def rounded_inputs(self, architecture: Architecture) -> dict[str, ActivationScheme]:
        """How the inputs of matrices are rounded: of those in blocks that the stage rounds."""
        scheme = self.activation_scheme
        if scheme is None:
            return {}
        names = self.schemes(architecture)
        return {name: scheme for name in names if architecture.matrix(name).block is not None}

    def plan(self, architecture: Architecture, problems: ReportProblem) -> Architecture:
        """The architecture with a grid on every chosen matrix; each matrix is rounded once."""
        schemes = self.schemes(architecture)
        chosen = checked_choice(self, schemes, architecture, problems)
        if not chosen:
            return architecture
        self._check_tables(architecture, problems)
        self._check_overrides(architecture, schemes, problems)
        self._check_allotment(architecture, schemes, problems)
        if self.weights in FORMATS:
            for problem in format_problems(self.weights, dict(self), architecture, chosen):
                problems(*problem)
        else:
            self._check_groups(chosen, schemes, problems)
        self._check_activations(chosen, problems)
        architecture = architecture.with_schemes(schemes)
        return architecture.with_activations(self.rounded_inputs(architecture))

    def _check_activations(self, chosen: Sequence[Matrix], problems: ReportProblem) -> None:
        allowed = ("none", *inputs_of(self.weights))
        if self.activations not in allowed:
            problems(
                "activations",
                f"engines do not multiply {self.weights} weights by {self.activations} inputs",
                f"beside {self.weights} weights: {', '.join(allowed)}",
            )
        experts = [matrix for matrix in chosen if matrix.expert is not None]
        if experts and self.activations != "none":
            problems(
                "activations",
                f"{experts[0].name} is an expert, and transformers does not round the inputs of "
                "experts, so that what is served could not be measured",
                "write `activations: none`",
            )

    def unread(self) -> Mapping[str, str]:
        """A width for matrices that stay dense, or have their grid from allocate.bits."""
        rounded = "quantize" in (self.embeddings, self.head)
        return {} if rounded else {"embedding_bits": "embeddings: quantize"}

    def remarks(self, before: Architecture) -> tuple[str, ...]:
        """With overrides, how many matrices have which grid; and that scores see rounded inputs."""
        said = []
        if self.overrides:
            counted = Counter(self.schemes(before).values())
            grids = (f"{grid_label(scheme)} on {count}" for scheme, count in counted.items())
            said.append(f"grids and their numbers of matrices: {', '.join(grids)}")
        if rounded := self.rounded_inputs(before):
            said.append(
                f"the inputs of {len(rounded)} matrices are rounded to {self.activations}, token "
                "by token; scores are taken with that rounding"
            )
        return tuple(said)

    def refuse_two_bits(
        self, what: str, architecture: Architecture, problems: ReportProblem
    ) -> None:
        """Report every width of 2 bits that is written or all that a stage before allows.

        Args:
            what: the way of rounding, to complete "2-bit … ruins a model".
            architecture: what the stage rounds.
            problems: where to report.
        """
        allotted = [m.allotted.bits for m in architecture.matrices if m.allotted]
        widths = [("method", max(allotted))] if allotted else [("bits", self.bits)]
        widths += [(f"overrides.{i}.bits", o.bits) for i, o in enumerate(self.overrides) if o.bits]
        for place, bits in widths:
            if bits <= 2 and not self.force:
                problems(
                    place,
                    f"{bits}-bit {what} ruins a model",
                    "use quantize.gptq, 3 bits or more, or write `force: true`",
                )

    def _check_tables(self, architecture: Architecture, problems: ReportProblem) -> None:
        """Embedding and head, which every rounder rounds to nearest."""
        rounded = "quantize" in (self.embeddings, self.head)
        if rounded and self.embedding_bits <= 2 and not self.force:
            problems(
                "embedding_bits",
                "embedding and head are rounded to nearest, which with 2 bits ruins a model",
                "write 3 bits or more, 8 to be safe, or `force: true`",
            )
        if self.head == "quantize" and architecture.tied and self.embeddings == "keep":
            problems(
                "head",
                "the head is tied to the embedding, so that it cannot be rounded alone",
                "write `embeddings: quantize` as well, or `head: keep`",
            )

    def _check_overrides(
        self,
        architecture: Architecture,
        schemes: Mapping[str, WeightScheme],
        problems: ReportProblem,
    ) -> None:
        """Every override must change the grid of a matrix that the stage rounds."""
        for index, override in enumerate(self.overrides):
            place = f"overrides.{index}.pattern"
            matched = override.names(architecture)
            if not matched:
                check_patterns(place, architecture.select((override.pattern,)), problems)
            elif not matched & schemes.keys():
                message = f"{override.pattern!r} matches only matrices that the stage leaves alone"
                problems(place, message, "add them to `targets`, or remove the override")
            elif is_idle(index, self.overrides, matched & schemes.keys(), architecture):
                message = f"later overrides replace all that the one of {override.pattern!r} sets"
                problems(place, message, "the last one wins: write the wider pattern first")

    def _check_allotment(
        self,
        architecture: Architecture,
        schemes: Mapping[str, WeightScheme],
        problems: ReportProblem,
    ) -> None:
        """Grids that an earlier stage chose under a budget are used, all of them."""
        allotted = [matrix for matrix in architecture.matrices if matrix.allotted]
        if left := [matrix.name for matrix in allotted if matrix.name not in schemes]:
            more = f" and {len(left) - 1} more" if len(left) > 1 else ""
            message = f"allocate.bits chose a grid for {left[0]}{more}, and this stage leaves it"
            problems("targets", message, "write the `targets` and `ignore` of allocate.bits here")
        for name in ("weights", "bits", "group_size", "symmetry") if allotted else ():
            if getattr(self, name) != type(self).model_fields[name].default:
                message = "allocate.bits chooses the grid of every matrix, so this has no effect"
                problems(name, message, f"remove `{name}` here, or give choices in allocate.bits")

    def _check_groups(
        self, chosen: Sequence[Matrix], schemes: Mapping[str, WeightScheme], problems: ReportProblem
    ) -> None:
        """Groups must divide the inputs; one problem for every pair of size and width."""
        bad: dict[tuple[int, int], list[Matrix]] = {}
        for matrix in chosen:
            size, width = schemes[matrix.name].group_size, matrix.shape[1]
            if size is not None and width % size:
                bad.setdefault((size, width), []).append(matrix)
        common = math.gcd(*(matrix.shape[1] for matrix in chosen))
        works = [str(size) for size in range(16, 257) if common % size == 0]
        for (size, width), matrices in bad.items():
            more = f" (and {len(matrices) - 1} more of that width)" if len(matrices) > 1 else ""
            problems(
                self._place_of_group(size),
                f"groups of {size} do not divide the {width} inputs of {matrices[0].name}{more}",
                f"group sizes that divide every target: {', '.join([*works, 'channel'])}",
            )

    def _place_of_group(self, size: int) -> str:
        """The option that asks for groups of this size."""
        for index, override in enumerate(self.overrides):
            if override.group_size == size != self.group_size:
                return f"overrides.{index}.group_size"
        return "group_size"


def grid_label(scheme: WeightScheme, inputs: ActivationScheme | None = None) -> str:
    """Such as `W4 g64`, `W3 channel asym` or `W8A8 channel`."""
    if scheme.number == "float":
        return float_label(scheme, inputs)
    group = "channel" if scheme.group_size is None else f"g{scheme.group_size}"
    kind = {"symmetric": "", "full_range": " full range", "asymmetric": " asym"}[scheme.symmetry]
    return f"W{scheme.bits}{f'A{inputs.bits}' if inputs else ''} {group}{kind}"


class Choosing(Protocol):
    """A stage that says by patterns what it rounds."""

    @property
    def targets(self) -> tuple[str, ...]:
        """What to round."""
        ...

    @property
    def ignore(self) -> tuple[str, ...]:
        """What not to; wins over `targets`."""
        ...


def checked_choice(
    stage: Choosing,
    names: Iterable[str],
    architecture: Architecture,
    problems: ReportProblem,
    hint: str = "use the pattern `linear`, and `embeddings: quantize` or `head: quantize`",
) -> list[Matrix]:
    """The matrices that a stage rounds, after the checks that every rounder makes of its choice.

    Args:
        stage: what it was told.
        names: of the matrices that this comes to.
        architecture: before the stage.
        problems: where to report.
        hint: what to write for a matrix outside the decoder blocks.
    """
    check_patterns("targets", architecture.select(stage.targets), problems)
    check_patterns("ignore", architecture.select(stage.ignore), problems)
    chosen = [architecture.matrix(name) for name in names]
    if chosen:
        check_places(stage.targets, stage.ignore, architecture, problems, hint)
        check_rounded_once(chosen, problems)
    elif architecture.select(stage.targets).matrices:
        problems("ignore", "it covers every target, so that nothing is left to round", "")
    return chosen


def check_patterns(option_name: str, selection: Selection, problems: ReportProblem) -> None:
    """Every pattern must match a matrix."""
    for missed in selection.unmatched:
        message = f"the pattern {missed.pattern!r} matches no matrix of the model"
        problems(option_name, message, missed.suggestion)


def check_places(
    targets: Sequence[str],
    ignore: Sequence[str],
    architecture: Architecture,
    problems: ReportProblem,
    hint: str,
) -> None:
    """Targets are linear layers of blocks; `hint` is for what is outside them."""
    ignored = {matrix.name for matrix in architecture.select(ignore).matrices}
    for matrix in architecture.select(targets).matrices:
        if matrix.name in ignored:
            continue
        if matrix.role == "router":
            problems(
                "targets",
                f"{matrix.name} is a router; rounding it changes which experts run",
                "add it to `ignore`, or use the pattern `linear`, which leaves routers out",
            )
        elif matrix.block is None:
            problems(
                "targets",
                f"{matrix.name} is outside the decoder blocks",
                hint,
            )


def check_rounded_once(chosen: Sequence[Matrix], problems: ReportProblem) -> None:
    """No matrix may have codes of an earlier stage."""
    twice = [matrix for matrix in chosen if matrix.scheme is not None]
    if twice and twice[0].scheme is not None:
        more = f" and {len(twice) - 1} more matrices" if len(twice) > 1 else ""
        verb = "are" if len(twice) > 1 else "is"
        problems(
            "targets",
            f"{twice[0].name}{more} {verb} rounded by an earlier stage already "
            f"({twice[0].scheme.bits} bits); a second rounding adds its error to the first",
            "round every matrix once: narrow `targets` or add to `ignore` in one of the stages",
        )
