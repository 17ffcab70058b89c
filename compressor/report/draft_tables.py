"""Tables of drafts: speed, speed by kind of text, exits tried, acceptance by position."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from compressor.decoding.results import DraftSpeed
from compressor.report import numbers
from compressor.report.schema import Draft, Report
from compressor.report.tables import Table, or_none


def draft_tables(report: Report) -> list[Table]:
    """Speed and acceptance of every draft."""
    if not report.drafts:
        return []
    found = [draft_speeds(report)]
    for draft in report.drafts:
        found.append(_draft_acceptance(draft))
        found += [_draft_domains(draft)] if draft.measurement.speeds[0].domains else []
        found += [_exits(draft)] if draft.measurement.exits else []
    return found


def _draft_domains(draft: Draft) -> Table:
    """Speed-up by domain at batch 1."""
    speed = draft.measurement.speeds[0]
    return Table(
        f"speed-{draft.id}",
        f"{draft.label}: speed-up over plain decoding by kind of text, one prompt at a time.",
        ("text", "predicted", "measured"),
        tuple(
            (name, numbers.ratio(found.predicted), numbers.ratio(found.measured))
            for name, found in speed.domains.items()
        ),
        frozenset({0}),
    )


def _exits(draft: Draft) -> Table:
    """Every exit that was tried."""
    return Table(
        f"exits-{draft.id}",
        f"{draft.label}: the places tried, each with its best γ; the one with the largest "
        "prediction was taken.",
        ("exit after block", "γ", "τ", "c", "predicted"),
        tuple(
            (
                str(trial.exit),
                str(trial.drafted),
                numbers.number(trial.length),
                numbers.number(trial.draft_cost),
                numbers.ratio(trial.predicted),
            )
            for trial in draft.measurement.exits
        ),
    )


def draft_speeds(report: Report) -> Table:
    """What every draft costs and gains, by batch size; no rows without a draft."""
    return Table(
        "drafts",
        "Greedy decoding with a draft against plain decoding, wall-clock on this machine. γ: "
        "tokens drafted before each pass, the best by prediction. τ: tokens per pass, the "
        "target's own included. c: a draft step, v: a pass over γ + 1 tokens, both in plain "
        "steps. Predicted: τ at γ / (γ c + v). Tracked: exit and γ chosen before every pass. "
        "Lookup: n-grams copied from the text. Assisted: "
        "transformers with the same draft.",
        tuple(_SPEEDS),
        tuple(
            tuple(cell(draft, speed) for cell in _SPEEDS.values())
            for draft in report.drafts
            for speed in draft.measurement.speeds
        ),
    )


_SPEEDS: Mapping[str, Callable[[Draft, DraftSpeed], str]] = {
    "draft": lambda draft, _: draft.label,
    "on disk": lambda draft, _: numbers.size(draft.bytes_on_disk),
    "batch": lambda _, speed: str(speed.batch),
    "γ": lambda _, speed: str(speed.drafted),
    "τ": lambda draft, speed: numbers.number(
        1 + sum(draft.measurement.greedy.by_position[: speed.drafted])
    ),
    "c": lambda _, speed: numbers.number(speed.draft_cost),
    "v": lambda _, speed: numbers.number(speed.verify_costs[speed.drafted - 1]),
    "predicted": lambda _, speed: numbers.ratio(speed.predicted),
    "measured": lambda _, speed: numbers.ratio(speed.measured),
    "tree": lambda _, speed: or_none(speed.tree, numbers.ratio),
    "tracked": lambda _, speed: or_none(speed.tracked, numbers.ratio),
    "untrained": lambda _, speed: or_none(speed.untrained, numbers.ratio),
    "lookup": lambda _, speed: numbers.ratio(speed.lookup),
    "assisted": lambda _, speed: or_none(speed.assisted, numbers.ratio),
}


def _draft_acceptance(draft: Draft) -> Table:
    found = draft.measurement
    rows = [
        (name, kind, acceptance)
        for name, domain in found.domains.items()
        for kind, acceptance in (("greedy", domain.greedy), ("sampled", domain.sampled))
    ]
    rows += [
        ("all domains", "greedy", found.greedy),
        ("all domains", "sampled", found.sampled),
        ("prompt lookup", "greedy", found.lookup),
    ]
    beside = (("untrained draft", found.untrained), ("tracked exit", found.tracked))
    rows += [(name, "greedy", one) for name, one in beside if one is not None]
    places = len(found.greedy.by_position)
    return Table(
        f"acceptance-{draft.id}",
        f"{draft.label}: share of blocks in which the first tokens were all accepted, by their "
        "number. Sampled: temperature 1. Prompt lookup proposes in some blocks only: its shares "
        "are of these, its τ is of all.",
        ("text", "decoding", "blocks", "τ", *(str(place) for place in range(1, places + 1))),
        tuple(
            (
                name,
                kind,
                numbers.count(acceptance.blocks),
                numbers.number(acceptance.length),
                *(numbers.share(share) for share in acceptance.by_position),
            )
            for name, kind, acceptance in rows
        ),
        frozenset({0, 1}),
    )
