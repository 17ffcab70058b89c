"""Sections of a recipe: what is exported and published, its efforts, and the lock."""

from __future__ import annotations

import re
from typing import Literal, Self

from pydantic import Field, SkipValidation, field_validator, model_validator

from compressor.calibration import CalibrationConfig
from compressor.efforts import DEFAULT, EffortName
from compressor.evaluation.config import EvaluateConfig
from compressor.evaluation.gates import Gates
from compressor.formats.capabilities import Container
from compressor.formats.gguf_types import MIXTURES, GgufType, QuantType
from compressor.section import Section
from compressor.stages.base import StageConfig

ExportFormat = Literal[
    "compressed-tensors", "gptq", "awq", "bitsandbytes", "gguf", "dense", "onnx", "openvino"
]

EngineName = Literal[
    "transformers",
    "vllm",
    "vllm-cpu",
    "sglang",
    "llama.cpp",
    "gptqmodel",
    "onnxruntime",
    "openvino",
]

_REPOSITORY = r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$"


class ExportConfig(Section):
    """A deliverable that the run writes at the end."""

    format: ExportFormat = Field(
        description="`compressed-tensors` packs the integer codes for vLLM, SGLang and "
        "Transformers; `gptq` and `awq` pack them for engines that read those layouts; `gguf` is "
        "one file for llama.cpp; `bitsandbytes` is for what quantize.bnb rounded; `dense` is the "
        "same model with ordinary weights, for any program; `onnx` and `openvino` are graphs of it "
        "with weights in fp32, written by optimum in an environment of its own.",
    )
    form: Literal["auto", "pack-quantized", "int-quantized"] = Field(
        default="auto",
        description="Layout of compressed-tensors: codes packed into words, or one byte a code "
        "(8 bits by channel, or any width beside rounded inputs). `auto` packs, except for 8-bit "
        "weights beside rounded inputs, which kernels read as bytes.",
    )
    type: QuantType | None = Field(
        default=None,
        description="For `gguf`: let llama.cpp's own quantizer (llama-quantize) round the weights "
        "to one of its types, such as Q4_K_M or IQ4_XS. It is a second quantizer: the chain must "
        "not have rounded the weights before, and what it makes is measured like a stage. Without "
        "a type, the codes of the chain go into the file as they are.",
    )
    imatrix: bool = Field(
        default=True,
        description="With `type`: weigh its errors by the mean squares of inputs on the recipe's "
        "calibration text, measured after the last stage.",
    )
    embedding: Literal["keep", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0"] = Field(
        default="keep",
        description="For `gguf` without a type: round the embedding, and a head of its own, which "
        "the chain left dense, to blocks of this type, to nearest as llama.cpp does. Only this "
        "file has it, so that it is measured as a row of its own. In a small model a dense "
        "embedding is half of a file of 4 bits, and Q8_0 halves it. `keep` leaves it as it is.",
    )
    engines: tuple[EngineName, ...] = Field(
        default=(),
        description="Programs that must load the result; the plan refuses what one of them cannot. "
        "See compress ls engines.",
    )

    @property
    def container(self) -> Container:
        """What lies on disk: the layout, for formats with several."""
        if self.type is not None:
            return "llama-quantize"
        return self.form if self.format == "compressed-tensors" else self.format

    @property
    def blocks(self) -> GgufType | None:
        """What an embedding that the chain left dense is rounded to, if it is."""
        return None if self.embedding == "keep" else self.embedding

    @property
    def rounds(self) -> bool:
        """Whether it rounds weights that the chain left alone, and has a row of its own."""
        return self.type is not None or self.blocks is not None

    @property
    def name(self) -> str:
        """Of its folder: `gguf`, or `gguf-Q4_K_M`, or `gguf-embedding-Q8_0`."""
        if self.blocks is not None:
            return f"{self.format}-embedding-{self.blocks}"
        return self.format if self.type is None else f"{self.format}-{self.type}"

    @model_validator(mode="after")
    def _typed(self) -> Self:
        homes = {"form": "compressed-tensors", "type": "gguf", "embedding": "gguf"}
        stray = [
            f"`{key}` is for format {home}; {self.format} has none"
            for key, home in homes.items()
            if self.format != home and getattr(self, key) != type(self).model_fields[key].default
        ]
        if stray:
            raise ValueError("; ".join(stray))
        if self.blocks is not None and self.type is not None:
            raise ValueError(
                f"`embedding` is for our codes; {self.type} rounds the embedding itself"
            )
        if not self.imatrix and self.type is None:
            raise ValueError("`imatrix` is for llama.cpp's quantizer: name a `type` too")
        if self.type is not None and MIXTURES[self.type].needs_importance and not self.imatrix:
            raise ValueError(f"{self.type} needs an importance matrix: leave `imatrix` true")
        return self


class PublishConfig(Section):
    """Where the deliverables of a finished run go on the Hub."""

    repo: str = Field(
        description="`org/name`; further deliverables go to `org/name-FORMAT`. Access and licence "
        "are checked before any work.",
        json_schema_extra={"pattern": _REPOSITORY},
    )
    public: bool = Field(
        default=False, description="Show it to everyone, once it was read back from the Hub."
    )
    pr: bool = Field(default=False, description="Propose the files as a pull request.")

    @field_validator("repo")
    @classmethod
    def _names_a_repository(cls, repo: str) -> str:
        if not re.fullmatch(_REPOSITORY, repo):
            raise ValueError(
                f"{repo!r} is not of the form `org/name`: letters, digits, '.', '_' and '-', "
                "each part beginning with a letter or a digit"
            )
        return repo


class Lock(Section):
    """What a finished run was made of; the engine refuses to reproduce it from anything else."""

    model: str = Field(description="Hub id, directory or builtin name, as typed.")
    revision: str | None = Field(default=None, description="Commit of the model on the Hub.")
    config_sha256: str = Field(description="SHA-256 of the model's config.json.")
    weights: dict[str, str] = Field(description="SHA-256 of every weight file, by name.")
    calibration_sha256: str | None = Field(
        default=None, description="SHA-256 of the calibration tokens."
    )
    packages: dict[str, str] = Field(description="Versions that decide the bytes, by package.")
    effort: EffortName = Field(default=DEFAULT, description="The effort that was chosen.")
    added: tuple[str, ...] = Field(
        default=(), description="Deliverables that `compress export` added to the finished run."
    )


class Effort(Section):
    """Keys of a recipe that an effort changes; `compressor.efforts` says how they are merged.

    They are judged where they are merged, not here, where a section may be a part of one.
    """

    seed: SkipValidation[int | None] = Field(default=None, description="Replaces the seed.")
    calibration: SkipValidation[CalibrationConfig | None] = Field(
        default=None, description="Keys that differ, such as `samples`."
    )
    stages: SkipValidation[tuple[StageConfig, ...] | None] = Field(
        default=None, description="All stages, in place of the recipe's."
    )
    evaluate: SkipValidation[EvaluateConfig | None] = Field(
        default=None, description="Keys that differ."
    )
    gates: SkipValidation[Gates | None] = Field(default=None, description="Limits that differ.")
    export: SkipValidation[tuple[ExportConfig, ...] | None] = Field(
        default=None, description="All deliverables, in place of the recipe's."
    )


class Efforts(Section):
    """Other efforts than the recipe's own, chosen with `--effort`."""

    light: Effort | None = Field(
        default=None, description="For a first try: what saves time, at some accuracy."
    )
    best: Effort | None = Field(
        default=None, description="For the final model: what gains accuracy, at some time."
    )
