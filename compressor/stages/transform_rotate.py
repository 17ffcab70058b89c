"""`transform.rotate`: rotate the residual stream and the values; the function stays the same."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from compressor.numerics.hadamard_orders import hadamard_block
from compressor.stages.base import Need, ReportProblem, StageConfig, option
from compressor.stages.overrides import GroupSize, group_of
from compressor.types import WeightScheme

if TYPE_CHECKING:
    from compressor.calibration import CalibrationSet
    from compressor.model.architecture import Architecture
    from compressor.model.matrices import Matrix
    from compressor.stages.context import StageContext
    from compressor.types import StageResult

_NORMS = {
    "layer": "its LayerNorm subtracts the mean of the channels, which a rotation mixes; only "
    "RMSNorm commutes with one",
    "rms_plus_one": "its norms scale by 1 + w, and behind a folded norm w would have to be zero "
    "everywhere; this is not built",
}


class TransformRotate(StageConfig):
    """Spread outliers over all channels by rotations folded into the weights (QuaRot's R1, R2).

    Nothing runs at inference: the checkpoint is one of the same class. Weights without outliers
    round better at the same bits; a model that has none gains nothing. Rotated weights are
    rounded once to the checkpoint's own dtype, which costs a thousandth of what 4 bits cost.
    """

    source: ClassVar[str] = (
        "Ashkboos et al. 2024, QuaRot, arXiv:2404.00456; R1 and R2 as named in SpinQuant, "
        "arXiv:2405.16406"
    )

    method: Literal["transform.rotate"] = "transform.rotate"
    where: Literal["all", "residual", "heads"] = option(
        "all",
        "What is rotated: `residual`, the stream between the blocks (R1); `heads`, the values of "
        "every attention head (R2); or both.",
        effect="R1 needs pre-norm blocks with RMSNorm and, if embedding and head are tied, a head "
        "of its own, which costs bytes; R2 works in almost every family and costs nothing.",
        source="QuaRot, section 4",
    )
    kind: Literal["hadamard", "orthogonal"] = option(
        "hadamard",
        "`hadamard`: entries of equal size and random sign, in blocks where the width has no "
        "Hadamard matrix; `orthogonal`: uniformly random, for any width.",
        effect="Hadamard spreads a single outlier perfectly evenly and is applied in a fraction "
        "of the time.",
        source="QuaRot compares both; SpinQuant finds Hadamard to vary less from seed to seed",
    )
    seed: int = option(
        0,
        "Chooses the random signs or matrices.",
        effect="Results differ a little from seed to seed.",
        source="SpinQuant, arXiv:2405.16406",
        ge=0,
    )

    learn: int = option(
        0,
        "Steps of descent that turn the seeded rotations until the rounded model predicts like "
        "the original, each on one batch of calibration text; 0 keeps them.",
        effect="A step runs the whole model forward twice and back once, in fp32, with all of it "
        "in memory. The state that does best on held-out text is kept, if need be the seed's.",
        source="SpinQuant, arXiv:2405.16406; Cayley steps, arXiv:2002.01113",
        ge=0,
        le=10_000,
    )
    bits: int = option(
        4,
        "Width that rotations are learned for; that of the rounder where left out.",
        effect="Without `learn`, none.",
        ge=2,
        le=8,
    )
    group_size: GroupSize = option(
        128,
        "Inputs that share one scale where rotations are learned; the rounder's where left out.",
        effect="Without `learn`, none.",
    )
    angle: float = option(
        0.02,
        "Of the first step, in radians, as the root mean square over all channels; falls to 0 "
        "linearly.",
        effect="Larger is faster and less steady. Without `learn`, none.",
        gt=0,
        le=1,
    )

    @property
    def label(self) -> str:
        """Such as `Rotate R1 R2`."""
        parts = {"all": "R1 R2", "residual": "R1", "heads": "R2"}[self.where]
        kind = " orthogonal" if self.kind == "orthogonal" else ""
        return f"Rotate {parts}{kind}" + (f" learned {self.learn}" if self.learn else "")

    @property
    def scheme(self) -> WeightScheme:
        """The grid that rotations are learned for."""
        return WeightScheme(self.bits, group_of(self.group_size))

    def foretells(self, rounder: StageConfig) -> dict[str, Any]:
        """With `learn`, the grid."""
        names = ("bits", "group_size") if self.learn else ()
        return {name: getattr(rounder, name) for name in names if hasattr(rounder, name)}

    def unread(self) -> Mapping[str, str]:
        """What learning alone reads."""
        names = () if self.learn else ("bits", "group_size", "angle")
        return dict.fromkeys(names, "learn: 200")

    def learned_block(self, size: int) -> int:
        """Size of the blocks that are learned in a stream of `size` channels."""
        return max(block for block in range(1, min(size, _LARGEST_BLOCK) + 1) if not size % block)

    def calibration_need(self) -> Need | None:
        """Only learning looks at text."""
        if not self.learn:
            return None
        return Need("learn", "rotations are learned on calibration text")

    @property
    def residual(self) -> bool:
        """Whether the residual stream is rotated."""
        return self.where != "heads"

    @property
    def heads(self) -> bool:
        """Whether the values of the heads are."""
        return self.where != "residual"

    def plan(self, architecture: Architecture, problems: ReportProblem) -> Architecture:
        """The architecture with a head of its own; refuses what would change the function."""
        if self.residual:
            self._check_residual(architecture, problems)
        if self.heads:
            self._check_heads(architecture, problems)
        if self.learn:
            self._check_learning(architecture, problems)
        if self.residual and architecture.tied:
            return architecture.with_config(tie_word_embeddings=False)
        return architecture

    def _check_residual(self, architecture: Architecture, problems: ReportProblem) -> None:
        reason = _NORMS.get(architecture.norm)
        if reason is None and not architecture.prenorm:
            reason = "its blocks normalise what they add to the residual stream (post-norm), and "
            reason += "the scale of such a norm cannot be folded away"
        if reason:
            message = f"the residual stream of {architecture.family} cannot be rotated: {reason}"
            problems("where", message, "write `where: heads`, or leave the stage out")
        self._check_size("the residual stream", architecture.hidden, problems)

    def _check_heads(self, architecture: Architecture, problems: ReportProblem) -> None:
        values = [m for m in architecture.matrices if architecture.value_rows(m) is not None]
        if not values:
            problems(
                "where",
                f"the values of {architecture.family} cannot be rotated: its fused matrix holds "
                "query, key and value head by head",
                "leave the stage out",
            )
        self._check_size("a head", architecture.head_dim, problems)

    def _check_learning(self, architecture: Architecture, problems: ReportProblem) -> None:
        inner = [matrix for matrix in architecture.matrices if matrix.block is not None]
        odd = [m.name for m in inner if m.kind in ("expert", "conv1d")]
        if odd:
            what = "is no module of its own, and learning rounds those only"
            problems("learn", f"{odd[0]} {what}", "write `learn: 0`")
        size = self.scheme.group_size
        rounded = [m for m in inner if m.role != "router"]
        if size and (bad := [matrix for matrix in rounded if matrix.shape[1] % size]):
            message = (
                f"groups of {size} do not divide the {bad[0].shape[1]} inputs of {bad[0].name}"
            )
            problems("group_size", message, "write the group size of the rounder, or `channel`")

    def _check_size(self, what: str, size: int, problems: ReportProblem) -> None:
        if self.kind == "hadamard" and hadamard_block(size) < _SMALLEST_BLOCK:
            problems(
                "kind",
                f"{what} has {size} channels, and no Hadamard matrix of {_SMALLEST_BLOCK} or more "
                "divides that",
                "write `kind: orthogonal`",
            )

    def changed(self, before: Architecture, after: Architecture) -> tuple[Matrix, ...]:
        """Everything on the residual stream, or values and outputs alone."""
        del before
        if self.residual:
            return tuple(matrix for matrix in after.matrices if matrix.role != "position")
        return tuple(m for m in after.matrices if m.role == "o" or after.value_rows(m) is not None)

    def remarks(self, before: Architecture) -> tuple[str, ...]:
        """What untying costs, and where a rotation is only block-diagonal."""
        found = []
        if self.residual and before.tied:
            added = before.vocab * before.hidden * before.dtype_bytes
            found.append(
                f"unties the head, because the final norm is folded into it: {before.vocab} × "
                f"{before.hidden} weights more, {added / 1e6:.2f} MB, {added / before.bytes:.1%} "
                "of the model; `head: quantize` in the rounder halves that, `where: heads` "
                "avoids it"
            )
        sizes = {"residual stream": before.hidden} if self.residual else {}
        sizes |= {"head": before.head_dim} if self.heads else {}
        for what, size in sizes.items():
            block = hadamard_block(size)
            if self.kind == "hadamard" and block < size:
                found.append(
                    f"no Hadamard matrix of order {size} is known here, so the {what} is rotated "
                    f"in {size // block} blocks of {block}; `kind: orthogonal` mixes all channels"
                )
        if self.learn:
            found.append(
                f"learning holds the whole model in fp32, its rounded weights and their gradients: "
                f"{self.memory(before) / 1e9:.1f} GB; the rest of the stage holds one block"
            )
        return tuple(found)

    def memory(self, architecture: Architecture) -> int:
        """With `learn`: weights, rounded weights, gradients and one more matrix product's; logits.

        Logits of a batch are held four times: the teacher's, the student's, and what softmax and
        its gradient make of them.
        """
        if not self.learn:
            return 0
        return 4 * (4 * architecture.parameters + 4 * _PLANNED_BATCH * architecture.vocab)

    def flops(self, architecture: Architecture) -> float:
        """With `learn`, by step: two passes forward, one back, and six turns of every matrix."""
        if not self.learn:
            return 0.0
        inner = sum(m.parameters for m in architecture.matrices if m.block is not None)
        turns = 6 * 2.0 * inner * self.learned_block(architecture.hidden)
        return self.learn * (8.0 * architecture.parameters * _PLANNED_BATCH + turns)

    def run(
        self, checkpoint: Path, calibration: CalibrationSet | None, context: StageContext
    ) -> StageResult:
        """Fold the rotations block by block in fp64, then prove that the logits stayed."""
        from compressor.stages.rotating import rotate_model

        return rotate_model(self, checkpoint, calibration, context)


_SMALLEST_BLOCK = 4
_LARGEST_BLOCK = 1024  # of what is learned: a solve of that size for every step
_PLANNED_BATCH = 8 * 512  # tokens; the plan does not see how batches are cut
