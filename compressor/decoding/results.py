"""What the measurement of a draft gives, as it stands in the report. No torch."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

WORTHWHILE = 1.05
"""Below this measured speed-up a draft is not worth deploying."""


class Frozen(BaseModel):
    """A value; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Acceptance(Frozen):
    """How often the target agrees, over whole blocks of drafted tokens."""

    by_position: tuple[float, ...] = Field(
        description="a_1 ... a_n: of the blocks that proposed j tokens, the share in which the "
        "first j were all accepted"
    )
    length: float = Field(
        description="τ: tokens per pass over all blocks, the bonus token included; 1 + Σ a_j where "
        "every block proposes n"
    )
    blocks: int


class DraftDomain(Frozen):
    """One domain's acceptance, greedy and sampled at temperature 1."""

    greedy: Acceptance
    sampled: Acceptance


class DraftSpeed(Frozen):
    """Speed on this machine at one batch size, everything relative to plain decoding.

    `predicted` is τ / (γ c + v) from the measured acceptance and costs at γ = `drafted`, the best
    by that formula; the others are measured wall-clock, prompts included.
    """

    batch: int
    plain_tokens_per_second: float
    draft_cost: float = Field(description="c: one step of the draft / one plain step")
    verify_costs: tuple[float, ...] = Field(
        description="v for γ = 1 ... n: a pass over γ + 1 tokens / one plain step"
    )
    drafted: int
    predicted: float
    measured: float
    tree: float | None = Field(default=None, description="the same draft with a tree")
    untrained: float = Field(description="the draft as it was before training, same γ")
    lookup: float = Field(description="prompt lookup")
    assisted: float | None = Field(
        default=None, description="transformers' assisted generation with this draft, same γ"
    )


class DraftMeasurement(Frozen):
    """One draft against its target.

    Attributes:
        domains: acceptance by domain.
        greedy, sampled: over all domains.
        untrained, lookup: greedy acceptance of what needs no training.
        tree_length: τ with the tree, greedy; None where no tree was tried.
        speeds: by batch size, 1 first.
        prompts: compared token by token with plain decoding, greedy.
        identical: of these, how many gave the same tokens.
        largest_margin: difference of the target's two largest logits at the first difference of
            the worst prompt; 0 when there is none. Only ties may differ.
    """

    domains: dict[str, DraftDomain]
    greedy: Acceptance
    sampled: Acceptance
    untrained: Acceptance
    lookup: Acceptance
    tree_length: float | None
    speeds: tuple[DraftSpeed, ...]
    prompts: int
    identical: int
    largest_margin: float

    @property
    def worthwhile(self) -> bool:
        """Whether the draft pays at batch 1."""
        return self.speeds[0].measured >= WORTHWHILE
