"""What every stage's configuration shares: strict keys, documented options, a pure plan.

A stage is a frozen model of its options with two methods. `plan` maps an architecture to the
next one and reports what cannot work, from `config.json` alone; `run` does the work. Adding an
option means one field here or in the stage's own file: the recipe loader, the JSON Schema and
`compress explain` read it from there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import Field
from pydantic.config import JsonDict
from pydantic.fields import FieldInfo

from compressor.section import Section

if TYPE_CHECKING:
    from compressor.calibration import CalibrationConfig, CalibrationSet
    from compressor.model.architecture import Architecture
    from compressor.model.matrices import Matrix
    from compressor.stages.context import StageContext
    from compressor.types import StageResult

ReportProblem = Callable[[str, str, str], None]
"""Called with (option, message, hint) for everything that the plan finds wrong."""


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
    extra: JsonDict = {key: text for key, text in notes.items() if text}
    return Field(default, description=what, json_schema_extra=extra, **rules)


def precision_option() -> Any:
    """The option `precision` of stages that train."""
    return option(
        "auto",
        "Of products in forward and backward passes; weights and moments stay fp32. `auto` takes "
        "bf16 where the processor has units for it (GPUs, AMX).",
        effect="With such units bf16 takes half the time or less.",
    )


def minutes_option() -> Any:
    """The option `minutes` of stages that train: `Schedule.seconds` of `compressor.training`."""
    return option(
        None,
        "Stop after the update that ends past so many minutes; rates then fall with the clock.",
        effect="The result depends on the speed of the machine; what was left out is reported.",
        gt=0,
    )


def in_seconds(minutes: float | None) -> float | None:
    """What such an option bounds, as clocks count it."""
    return None if minutes is None else 60 * minutes


def patterns_option(default: tuple[str, ...], what: str, **rules: Any) -> Any:
    """An option that selects matrices by patterns."""
    return option(default, what, effect="A pattern that matches nothing is an error.", **rules)


def redefault(parent: FieldInfo, default: Any, *, effect: str = "", source: str = "") -> Any:
    """The option of a parent with another default; its words and rules stay where not given.

    Args:
        parent: such as `TrainConfig.model_fields["drift"]`.
        default: here.
        effect: what a different value does here.
        source: paper, equation or measurement behind this default.
    """
    extra = parent.json_schema_extra
    notes: dict[str, Any] = dict(extra) if isinstance(extra, dict) else {}
    notes |= {key: text for key, text in {"effect": effect, "source": source}.items() if text}
    field = option(default, parent.description or "", **notes)
    field.metadata = list(parent.metadata)
    return field


@dataclass(frozen=True)
class Need:
    """A stage cannot run without calibration text: which option asks for it, and why."""

    option: str
    reason: str


class StageConfig(Section, ABC):
    """One entry of `stages` in a recipe."""

    source: ClassVar[str] = ""
    """Paper or reference of the method, shown by `compress explain`."""

    beside: ClassVar[bool] = False
    """Whether the stage leaves the checkpoint as it is and makes something beside it: a draft."""

    rounds_weights: ClassVar[bool] = False
    """Whether the stage gives weights their final grid."""

    chooses_grids: ClassVar[bool] = False
    """Whether the rounder after the stage takes its grids from it."""

    shared: ClassVar[bool] = False
    """Whether all processes of a launch run the stage together; others are the first one's."""

    method: str

    @property
    def windows_at_once(self) -> int:
        """Windows of text that processes can share between them."""
        return 1

    @property
    def label(self) -> str:
        """A few words for tables and figures."""
        return self.method

    def calibration_need(self) -> Need | None:
        """Why the stage reads calibration text, or None when it reads none."""
        return None

    @property
    def width_multiple(self) -> int:
        """What the stage needs the widths of its model to be a multiple of."""
        return 1

    @property
    def settles_shape(self) -> bool:
        """Whether its run decides the architecture that it leaves; `plan` gives a likely one."""
        return False

    def foretells(self, rounder: StageConfig) -> dict[str, Any]:
        """Options that say how weights will be rounded after the stage, and their values there.

        Args:
            rounder: a later stage that rounds weights.
        """
        del rounder
        return {}

    def before(self, later: Sequence[StageConfig]) -> Self:
        """The stage with every option settled that depends on the stages after it.

        What it `foretells` is as in the first rounder after it, unless it is written.

        Args:
            later: the stages that follow, in order.
        """
        rounder = next((stage for stage in later if stage.rounds_weights), None)
        known = {} if rounder is None else self.foretells(rounder)
        missing = {k: value for k, value in known.items() if k not in self.model_fields_set}
        return self.model_copy(update=missing)

    def misjudged(self, later: Sequence[StageConfig]) -> dict[str, str]:
        """By option: that what the stage `foretells` is not what any rounder after it does.

        Args:
            later: the stages that follow, in order.
        """
        if any(stage.chooses_grids for stage in later):
            return {}
        rounders = [stage for stage in later if stage.rounds_weights]
        found = [self.foretells(rounder) for rounder in rounders]
        values = {name: [known.get(name) for known in found] for name in next(iter(found), ())}
        return {
            name: f"`{name}: {getattr(self, name)}` is not what follows: {rounders[0].method} "
            f"has {there[0]}, which this stage takes too where the option is left out"
            for name, there in values.items()
            if getattr(self, name) not in there
        }

    def plan(self, architecture: Architecture, problems: ReportProblem) -> Architecture:
        """The architecture this stage leaves. Pure: reads no file, loads no weight.

        Args:
            architecture: what the stage before leaves.
            problems: called for everything that cannot work on this architecture.
        """
        del problems
        return architecture

    def unread(self) -> Mapping[str, str]:
        """Options that nothing reads as the others stand, each with what it would take."""
        return {}

    def check_text(self, calibration: CalibrationConfig | None, problems: ReportProblem) -> None:
        """Report what cannot work on the text that the stage would read. Reads no document.

        Args:
            calibration: of the recipe.
            problems: called for everything that is wrong.
        """
        del calibration, problems

    def changed(self, before: Architecture, after: Architecture) -> tuple[Matrix, ...]:
        """The matrices of `after` that the stage writes anew; those `plan` altered, by default."""
        kept = set(before.matrices)
        return tuple(matrix for matrix in after.matrices if matrix not in kept)

    def alternatives(self, final: Architecture) -> Iterator[Architecture]:
        """What the run may come to instead of what `plan` gives as an example; none by default.

        Args:
            final: what the last stage leaves, by the plan.
        """
        yield from ()

    def flops(self, architecture: Architecture) -> float:
        """Operations of the stage; 0 leaves the estimate of a calibrated rounder."""
        del architecture
        return 0.0

    def memory(self, architecture: Architecture) -> int:
        """Bytes at the stage's peak; 0 leaves the estimate of a walk block by block."""
        del architecture
        return 0

    def remarks(self, before: Architecture) -> tuple[str, ...]:
        """Sentences that a user should read in the plan, such as what the stage costs in bytes."""
        del before
        return ()

    def operations(self, after: Architecture, tokens: int, plain: float) -> float:
        """Floating-point operations of the stage, for the plan.

        Args:
            after: the architecture it leaves.
            tokens: of calibration text; 0 when it reads none.
            plain: operations of a rounder that measures inputs and solves once.
        """
        del after, tokens
        return plain

    def working_memory(self, after: Architecture, tokens: int) -> int:
        """Bytes beyond those of a rounder that measures inputs and solves, for the plan."""
        del after, tokens
        return 0

    @abstractmethod
    def run(
        self, checkpoint: Path, calibration: CalibrationSet | None, context: StageContext
    ) -> StageResult:
        """Do the work and write the next checkpoint.

        Args:
            checkpoint: directory of the parent, a plain Hugging Face checkpoint.
            calibration: tokens; there whenever `calibration_need` asked for them.
            context: where to work and whom to tell.
        """
