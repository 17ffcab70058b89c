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


class DomainSpeed(Frozen):
    """One domain's speed-up over plain decoding at batch 1, at the γ of all domains."""

    predicted: float
    measured: float


class ExitTrial(Frozen):
    """One place at which a model that speculates for itself may exit."""

    exit: int = Field(description="blocks of a guess")
    length: float = Field(description="τ at `drafted`, greedy, over all domains")
    draft_cost: float = Field(description="c")
    drafted: int = Field(description="the best γ by prediction")
    predicted: float = Field(description="speed-up at that γ")


class Outlook(Frozen):
    """Why a draft does not pay, and where it would."""

    limit: str = Field(
        description="term of τ / (γ c + v) that, made good by itself, would help most: `draft "
        "cost`, `verify cost` or `acceptance`"
    )
    better_cost: float = Field(description="predicted speed-up at c = 0.05, all else the same")
    better_verify: float = Field(description="the same at v = 1")
    better_acceptance: float = Field(description="the same with four tokens of five accepted")
    paying_parameters: int | None = Field(
        description="parameters of a target with which the same draft, accepted as often and "
        "verified as cheaply, would pay; None if no size would do or the draft grows with it"
    )


class CurvePoint(Frozen):
    """Acceptance at one moment of training."""

    tokens: int = Field(description="positions that training had looked at")
    length: float = Field(description="τ on development text, greedy")


class LogFit(Frozen):
    """τ = intercept + slope · ln(tokens), least squares, with the 95 % interval of the slope."""

    intercept: float
    slope: float
    low: float | None = Field(description="None with fewer than three points")
    high: float | None


class LearningCurve(Frozen):
    """Acceptance against training tokens (Scylla: log-linear, arXiv:2505.07858)."""

    points: tuple[CurvePoint, ...]
    fit: LogFit | None


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
    untrained: float | None = Field(
        default=None, description="the draft as it was before training, same γ; none if untrained"
    )
    tracked: float | None = Field(
        default=None, description="early exit with exit and γ chosen anew before every pass"
    )
    domains: dict[str, DomainSpeed] = Field(
        default_factory=dict, description="speed-up by domain, at batch 1"
    )
    lookup: float = Field(description="prompt lookup")
    assisted: float | None = Field(
        default=None, description="transformers' assisted generation with this draft, same γ"
    )


class DraftMeasurement(Frozen):
    """One draft against its target.

    Attributes:
        domains: acceptance by domain.
        greedy, sampled: over all domains.
        untrained, lookup: greedy acceptance of what needs no training; `untrained` is None for a
            draft that is never trained.
        exits: of an early exit, every candidate that was tried; the chosen one is `exit`.
        tracked: of an early exit, greedy acceptance with exit and γ chosen before every pass.
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
    untrained: Acceptance | None = None
    lookup: Acceptance
    tree_length: float | None
    speeds: tuple[DraftSpeed, ...]
    prompts: int
    identical: int
    largest_margin: float
    exit: int | None = None
    exits: tuple[ExitTrial, ...] = ()
    tracked: Acceptance | None = None

    @property
    def worthwhile(self) -> bool:
        """Whether the draft pays at batch 1."""
        return self.speeds[0].measured >= WORTHWHILE
