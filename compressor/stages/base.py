"""What every stage's configuration shares: strict keys, documented options, a pure plan.

A stage is a frozen model of its options with two methods. `plan` maps an architecture to the
next one and reports what cannot work, from `config.json` alone; `run` does the work. Adding an
option means one field here or in the stage's own file: the recipe loader, the JSON Schema and
`compress explain` read it from there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from compressor.types import Symmetry, WeightScheme

if TYPE_CHECKING:
    from compressor.model.architecture import Architecture

ReportProblem = Callable[[str, str, str], None]
"""Called with (option, message, hint) for everything that the plan finds wrong."""

GroupSize = Literal["channel"] | Annotated[int, Field(ge=16)]


def option(default: Any, what: str, *, effect: str = "", source: str = "", **rules: Any) -> Any:
    """A documented field.

    Args:
        default: used when the recipe leaves the key out; `...` makes the key mandatory.
        what: what the option is, one sentence.
        effect: what a larger, smaller or different value does.
        source: paper, equation or measurement behind the default.
        rules: constraints that pydantic checks (`ge`, `le`, `min_length`, ...).
    """
    notes = {"effect": effect, "source": source}
    extra = {key: text for key, text in notes.items() if text}
    return Field(default, description=what, json_schema_extra=extra, **rules)


@dataclass(frozen=True)
class Need:
    """A stage cannot run without calibration text: which option asks for it, and why."""

    option: str
    reason: str


class StageConfig(BaseModel):
    """One entry of `stages` in a recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: ClassVar[str] = ""
    """Paper or reference of the method, shown by `compress explain`."""

    method: str

    def calibration_need(self) -> Need | None:
        """Why the stage reads calibration text, or None when it reads none."""
        return None

    def plan(self, architecture: Architecture, problems: ReportProblem) -> Architecture:
        """The architecture this stage leaves. Pure: reads no file, loads no weight.

        Args:
            architecture: what the stage before leaves.
            problems: called for everything that cannot work on this architecture.
        """
        del problems
        return architecture


class RounderConfig(StageConfig):
    """Options common to the methods that round weights to integer codes."""

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
    targets: tuple[str, ...] = option(
        ("linear",),
        "Matrices to round: `linear` for every linear layer of the decoder blocks, a role such as "
        "`down_proj`, a glob, or `re:` and a regular expression over names on disk.",
        effect="A pattern that matches nothing is an error.",
        min_length=1,
    )
    ignore: tuple[str, ...] = option(
        (),
        "Matrices to leave alone, written like `targets`; wins over them.",
        effect="A pattern that matches nothing is an error.",
    )
    embeddings: Literal["keep", "quantize"] = option(
        "keep",
        "Whether the input embedding is rounded to nearest as well.",
        effect="In small models the embedding is a large share of the bytes.",
    )
    head: Literal["keep", "quantize"] = option(
        "keep",
        "Whether the output head is rounded as well.",
        effect="The head is sensitive: 8 bits are safe, 4 usually are not.",
    )
    embedding_bits: int = option(
        8,
        "Width of one code in the embedding and the head, when they are quantized.",
        effect="Independent of `bits`, because these matrices suffer more from rounding.",
        ge=2,
        le=8,
    )
    force: bool = option(
        False,
        "Run a setting that is known to ruin models.",
        effect="Needed for 2 bits without compensation.",
    )

    @property
    def scheme(self) -> WeightScheme:
        """The grid of the targeted linear layers."""
        return self._scheme(self.bits)

    @property
    def embedding_scheme(self) -> WeightScheme:
        """The grid of the embedding and the head."""
        return self._scheme(self.embedding_bits)

    def _scheme(self, bits: int) -> WeightScheme:
        group = None if self.group_size == "channel" else self.group_size
        return WeightScheme(bits, group, self.symmetry)
