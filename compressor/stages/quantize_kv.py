"""`quantize.kv`: keep keys and values in 8 bits. Changes no weight."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from compressor.stages.base import Need, ReportProblem, StageConfig, option
from compressor.types import CacheScheme

if TYPE_CHECKING:
    from compressor.calibration import CalibrationSet
    from compressor.model.architecture import Architecture
    from compressor.model.matrices import Matrix
    from compressor.stages.context import StageContext
    from compressor.types import StageResult


class QuantizeKv(StageConfig):
    """Halve the memory of long contexts: the cache holds keys and values as 8-bit floats (e4m3)."""

    source: ClassVar[str] = "Micikevicius et al. 2022, FP8 formats, arXiv:2209.05433; vLLM"

    method: Literal["quantize.kv"] = "quantize.kv"
    format: Literal["fp8"] = option(
        "fp8",
        "What keys and values become: `fp8`, floats with 4 bits of exponent and 3 of mantissa "
        "(e4m3), with one scale for the keys and one for the values of a block.",
        effect="Half the cache of bf16, so twice the context or the requests in the same memory. "
        "Scores are taken with the cache rounded.",
    )
    headroom: float = option(
        2.0,
        "How many times the largest key and value of the calibration text the numbers reach.",
        effect="What lies beyond is cut off; other text reached half as far again. Room by powers "
        "of two is free, because it only moves exponents: 1, 2 and 8 measured the same. Between "
        "them the steps shift: 1.41 had the smallest error in the keys, and was worse.",
        source="LOG.md, fp8 cache",
        ge=1,
        le=64,
    )

    @property
    def label(self) -> str:
        """`KV fp8`."""
        return f"KV {self.format}"

    def calibration_need(self) -> Need | None:
        """Scales follow from what calibration text reaches."""
        return Need("method", "quantize.kv measures keys and values on calibration text")

    def plan(self, architecture: Architecture, problems: ReportProblem) -> Architecture:
        """The same weights with a rounded cache; refused where no engine could be told of it."""
        if not architecture.cached_attention:
            problems(
                "method",
                f"the attention of {architecture.family} is not one whose cache compressed-tensors "
                "can describe (it looks for k_proj or qkv_proj)",
                "leave the stage out",
            )
        if architecture.head_dim % 16:
            problems(
                "method",
                f"heads are {architecture.head_dim} wide, and kernels for an fp8 cache want "
                "multiples of 16",
                "leave the stage out",
            )
        return architecture.with_cache(CacheScheme())

    def changed(self, before: Architecture, after: Architecture) -> tuple[Matrix, ...]:
        """No matrix."""
        del before, after
        return ()

    def operations(self, after: Architecture, tokens: int, plain: float) -> float:
        """One forward pass of the calibration text."""
        del plain
        weights = sum(matrix.parameters for matrix in after.matrices if matrix.block is not None)
        return 2.0 * weights * tokens

    def remarks(self, before: Architecture) -> tuple[str, ...]:
        """What a token takes in the cache, before and after."""
        after = before.with_cache(CacheScheme())
        return (
            f"a token of context takes {after.kv_bytes_per_token:,} bytes of cache instead of "
            f"{before.kv_bytes_per_token:,}; scores are taken with the cache rounded",
        )

    def run(
        self, checkpoint: Path, calibration: CalibrationSet | None, context: StageContext
    ) -> StageResult:
        """Measure what keys and values reach, and write the scales beside unchanged weights."""
        from compressor.stages.caching import scale_cache

        assert calibration is not None  # calibration_need() says so; the recipe was checked
        return scale_cache(self, checkpoint, calibration.batches, context)
