"""`transform.rotate`: rotate the residual stream and the values; the function stays the same."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from compressor.numerics.hadamard_orders import hadamard_block
from compressor.stages.base import ReportProblem, StageConfig, option

if TYPE_CHECKING:
    from compressor.calibration import CalibrationSet
    from compressor.model.architecture import Architecture, Matrix
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

    @property
    def label(self) -> str:
        """Such as `Rotate R1 R2`."""
        parts = {"all": "R1 R2", "residual": "R1", "heads": "R2"}[self.where]
        return f"Rotate {parts}" + (" orthogonal" if self.kind == "orthogonal" else "")

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
        return tuple(found)

    def run(
        self, checkpoint: Path, calibration: CalibrationSet | None, context: StageContext
    ) -> StageResult:
        """Fold the rotations block by block in fp64, then prove that the logits stayed."""
        from compressor.stages.rotating import rotate_model

        del calibration
        return rotate_model(self, checkpoint, context)


_SMALLEST_BLOCK = 4
