"""What a recipe says under `evaluate`. Imports no torch: the command line reads it for `--help`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from compressor.section import Section

ProtocolName = Literal["rolling", "gptq", "llama.cpp"]


class Suite(Section):
    """Which text is scored and how: one file of `evals/suites`.

    Attributes:
        domains: names of the domains, each scored on its own.
        documents: documents taken from every domain's evaluation split; None takes all.
        bytes_per_document: UTF-8 bytes kept from the start of a document; None keeps it whole.
            A cut in bytes, not tokens, gives every tokenizer the same text.
        protocol: how text becomes windows; see `compressor.evaluation.protocols`.
        length: tokens a window holds; a model with a shorter context gets windows of its own size.
    """

    description: str
    domains: tuple[str, ...] = Field(min_length=1)
    documents: int | None = Field(default=None, ge=1)
    bytes_per_document: int | None = Field(default=None, ge=16)
    protocol: ProtocolName = "rolling"
    length: int = Field(default=512, ge=8)


class EvaluateConfig(Section):
    """How every variant of a run is measured against the base."""

    suite: str = Field(
        "quick", description="A shipped suite (quick, standard, full) or the path of one."
    )
    protocol: ProtocolName | None = Field(
        None, description="How text is cut into windows; replaces the suite's protocol."
    )
    length: int | None = Field(
        None, ge=8, description="Tokens per window; replaces the suite's length."
    )
    documents: int | None = Field(
        None, ge=1, description="Documents per domain; replaces the suite's number."
    )
    batch_size: int = Field(8, ge=1, description="Windows that go through the model together.")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="Precision of the forward pass; `auto`: float32 on a CPU, else bfloat16.",
    )
    text: dict[str, str] = Field(
        default_factory=dict,
        description="Your own text, domain to file (.txt is one document, .jsonl has rows with "
        "`text`); replaces the suite's domains and is not cut.",
    )
    noise_floor: bool = Field(
        True, description="Also score the base against itself at another batch size."
    )
    every_stage: bool = Field(
        True, description="Measure after every stage, not only the base and the last variant."
    )
    resamples: int = Field(
        2000, ge=100, le=100_000, description="Bootstrap resamples behind every interval."
    )
    seed: int = Field(0, ge=0, description="Of the bootstrap.")

    @model_validator(mode="after")
    def _even_length(self) -> EvaluateConfig:
        if self.protocol == "llama.cpp" and self.length is not None and self.length % 2:
            raise ValueError("length must be even under llama.cpp: it scores the second half")
        return self
