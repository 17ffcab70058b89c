"""Sentences about drafts: what they gain, and why they do not."""

from __future__ import annotations

from collections.abc import Iterator

from compressor.report.schema import Report, Statement, Style
from compressor.report.statements import Document, named_fallbacks, pointer, state


def _label(place: int) -> tuple[str, Style]:
    return pointer("drafts", place, "label"), "text"


def draft_claims(report: Report, document: Document) -> Iterator[Statement]:
    """What every draft gains, and that it changes no text."""
    for place, draft in enumerate(report.drafts):
        found = ("drafts", place, "measurement")
        yield state(
            document,
            f"draft-{draft.id}",
            "{label}: of {most} tokens drafted the target takes {length} a pass, its own included; "
            "drafting {drafted} was {measured} as fast as plain decoding here, text by text.",
            label=_label(place),
            most=(pointer("drafts", place, "stage", "params", "drafted"), "count"),
            length=(pointer(*found, "greedy", "length"), "number"),
            drafted=(pointer(*found, "speeds", 0, "drafted"), "count"),
            measured=(pointer(*found, "speeds", 0, "measured"), "ratio"),
        )
        speed = draft.measurement.speeds[0]
        if speed.tree is not None and speed.tree > speed.measured:
            yield state(
                document,
                f"tree-{draft.id}",
                "{label}: a tree of {nodes} proposals was {tree} as fast as plain decoding here; "
                "an engine must be able to verify trees.",
                label=_label(place),
                nodes=(pointer("drafts", place, "stage", "params", "tree_nodes"), "count"),
                tree=(pointer(*found, "speeds", 0, "tree"), "ratio"),
            )
        yield state(
            document,
            f"lossless-{draft.id}",
            "{label}: greedy text was the same in {identical} of {prompts} comparisons; where it "
            "was not, the two best tokens were at most {margin} apart.",
            label=_label(place),
            identical=(pointer(*found, "identical"), "count"),
            prompts=(pointer(*found, "prompts"), "count"),
            margin=(pointer(*found, "largest_margin"), "number"),
        )


def draft_warnings(report: Report, document: Document) -> Iterator[Statement]:
    """Drafts that do not pay and why, and what was done otherwise than asked."""
    for place, draft in enumerate(report.drafts):
        speed = draft.measurement.speeds[0]
        found = ("drafts", place, "measurement", "speeds", 0)
        label = _label(place)
        if not draft.worthwhile:
            yield state(
                document,
                f"no-speed-up-{draft.id}",
                "{label}: no speed-up, do not deploy: {measured} of plain decoding. A draft step "
                "costs {cost} of a plain step, and a pass over the drafted tokens {verify}.",
                label=label,
                measured=(pointer(*found, "measured"), "ratio"),
                cost=(pointer(*found, "draft_cost"), "ratio"),
                verify=(pointer(*found, "verify_costs", speed.drafted - 1), "ratio"),
            )
        if draft.outlook is not None:
            yield _outlook(report, document, place)
        if speed.lookup > speed.measured:
            yield state(
                document,
                f"lookup-{draft.id}",
                "{label}: prompt lookup, which needs no draft, was faster: {lookup}.",
                label=label,
                lookup=(pointer(*found, "lookup"), "ratio"),
            )
        if draft.stage.fallbacks:
            named, places = named_fallbacks(draft.stage, "drafts", place, "stage")
            yield state(
                document,
                f"fallbacks-{draft.id}",
                f"{{label}}: not everything was done as asked; {named}",
                label=label,
                **places,
            )


_PAYS = (
    "The same draft would pay for a target of {parameters} parameters, if it were accepted as "
    "often and verified as cheaply."
)
_NEVER = "No larger target would change that by itself."
_GROWS = "A draft of this kind grows with its target, whose size alone changes little."


def _outlook(report: Report, document: Document, place: int) -> Statement:
    """Which term holds a draft back, and where it would pay."""
    draft = report.drafts[place]
    assert draft.outlook is not None
    found = ("drafts", place, "outlook")
    known = draft.outlook.paying_parameters is not None
    never = _NEVER if draft.stage.method == "draft.standalone" else _GROWS
    parameters: dict[str, tuple[str, Style]] = {
        "parameters": (pointer(*found, "paying_parameters"), "count")
    }
    return state(
        document,
        f"outlook-{draft.id}",
        "{label}: what limits it most is the {limit}. Predicted with only a cheap draft: "
        "{cost}; with only free verification: {verify}; with only good acceptance: {acceptance}. "
        + (_PAYS if known else never),
        label=_label(place),
        limit=(pointer(*found, "limit"), "text"),
        cost=(pointer(*found, "better_cost"), "ratio"),
        verify=(pointer(*found, "better_verify"), "ratio"),
        acceptance=(pointer(*found, "better_acceptance"), "ratio"),
        **(parameters if known else {}),
    )
