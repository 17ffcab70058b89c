from __future__ import annotations

import pytest
from pydantic import ValidationError

from compressor.errors import VerificationError
from compressor.evaluation.results import Estimate
from compressor.report.build import build_report, check_report, pareto_of, verdict_of
from compressor.report.schema import Facts, Report, StageFacts, StageFallback
from tests.report import example

LAST = "2-quantize-gptq"


def changed(**values: object) -> Facts:
    return example.facts().model_copy(update=values)


def ids(report: Report) -> set[str]:
    return {warning.id for warning in report.warnings}


def test_the_example_is_consistent() -> None:
    check_report(example.report())


def test_headline_is_the_last_compared_variant() -> None:
    assert example.report().headline == LAST
    fewer = {k: v for k, v in example.facts().evaluations.items() if k != LAST}
    assert build_report(changed(evaluations=fewer)).headline == "1-prune-depth"
    assert build_report(changed(evaluations={})).headline == "base"


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [
        ([], "NO GATES"),
        (["PASS", "PASS"], "PASS"),
        (["PASS", "INCONCLUSIVE"], "INCONCLUSIVE"),
        (["INCONCLUSIVE", "FAIL", "PASS"], "FAIL"),
    ],
)
def test_verdict(verdicts: list[str], expected: str) -> None:
    gate = example.gates()[0]
    gates = tuple(gate.model_copy(update={"verdict": verdict}) for verdict in verdicts)
    assert verdict_of(changed(gates=gates)) == expected


def test_pareto_drops_what_another_variant_beats() -> None:
    assert pareto_of(example.facts()) == ("base", "1-prune-depth", LAST)
    facts = example.facts()
    worse = facts.evaluations["1-prune-depth"].overall.model_copy(
        update={"bits_per_byte": Estimate(value=2.0)}
    )
    evaluations = dict(facts.evaluations)
    evaluations["1-prune-depth"] = evaluations["1-prune-depth"].model_copy(
        update={"overall": worse}
    )
    assert pareto_of(changed(evaluations=evaluations)) == ("base", LAST)


def test_two_equal_points_both_stay() -> None:
    base = example.variants()[0]
    twin = example.variants()[1].model_copy(update={"size": base.size})
    evaluations = {"base": example.evaluation("base", 0), twin.id: example.evaluation(twin.id, 0)}
    assert pareto_of(changed(variants=(base, twin), evaluations=evaluations)) == ("base", twin.id)


def test_cost_of_a_stage_is_taken_against_its_parent() -> None:
    prune, quantize = example.report().attribution
    assert prune.paired
    assert prune.delta_to_parent == prune.delta_to_base
    assert not quantize.paired
    assert quantize.delta_to_parent is not None
    assert quantize.delta_to_parent.value == pytest.approx(0.0118, abs=1e-9)
    assert quantize.delta_to_parent.low is None
    assert prune.bytes_saved + quantize.bytes_saved == 271_403_118 - 111_722_332
    assert quantize.median_loss is not None
    assert quantize.median_baseline_loss is not None
    assert quantize.median_loss < quantize.median_baseline_loss


def test_a_measured_difference_to_the_parent_wins() -> None:
    measured = Estimate(value=0.0119, low=0.0101, high=0.0137)
    quantize = build_report(changed(parent_deltas={LAST: measured})).attribution[1]
    assert quantize.paired
    assert quantize.delta_to_parent == measured


def test_fallbacks_of_all_stages_are_gathered() -> None:
    (fallback,) = example.report().fallbacks
    assert fallback.variant == LAST
    assert fallback.module == "model.layers.3.mlp.down_proj"


def test_warnings_of_the_example() -> None:
    assert ids(example.report()) == {
        "contaminated-code",
        "spans-zero-encyclopedia",
        f"fallbacks-{LAST}",
    }


def test_fallbacks_are_named_one_for_each_reason() -> None:
    """Of sixty matrices with one reason the first is named; the others are counted."""
    (fallback,) = example.report().fallbacks
    same = [fallback.model_copy(update={"module": f"model.layers.{i}.q_proj"}) for i in range(60)]
    other = fallback.model_copy(update={"module": "lm_head", "reason": "it was on its grid"})
    said = []
    for found in ([fallback], [*same, other]):
        *before, last = example.facts().variants
        items = [StageFallback(**item.model_dump(exclude={"variant"})) for item in found]
        stage = last.stage.model_copy(update={"fallbacks": tuple(items)})
        report = build_report(changed(variants=(*before, last.model_copy(update={"stage": stage}))))
        check_report(report)
        (text,) = (w.text for w in report.warnings if w.id == f"fallbacks-{LAST}")
        said.append(text.partition("; ")[2])
    instead = "damping raised from 0.01 to 0.1"
    reason = f"(the Hessian was not positive definite: {instead})"
    assert said == [
        f"recorded fallbacks: 1, namely model.layers.3.mlp.down_proj {reason}.",
        f"recorded fallbacks: 61, among them model.layers.0.q_proj {reason}; "
        f"lm_head (it was on its grid: {instead}).",
    ]


def with_evaluation(**values: object) -> Facts:
    facts = example.facts()
    last = facts.evaluations[LAST].model_copy(update=values)
    return changed(evaluations={**facts.evaluations, LAST: last})


def test_warnings_about_the_sample() -> None:
    limited = build_report(with_evaluation(protocol=example.protocol(limit=4)))
    assert {"documents-limit", f"protocol-{LAST}"} <= ids(limited)
    few = example.facts().evaluations[LAST].overall.model_copy(update={"tokens": 900})
    assert "few-tokens" in ids(build_report(with_evaluation(overall=few)))


def test_domains_of_a_single_document_share_a_sentence() -> None:
    domains = dict(example.facts().evaluations[LAST].domains)
    domains["code"] = example.score("code", 1.0, documents=1)
    one = build_report(with_evaluation(domains=domains))
    domains["prose"] = example.score("prose", 1.0, documents=1)
    two = build_report(with_evaluation(domains=domains))
    said = [
        statement.text
        for report in (example.report(), one, two)
        for statement in report.warnings
        if statement.id == "one-document"
    ]
    assert said == [
        "Domain code has a single document and therefore no interval.",
        "Domains prose and code have a single document each and therefore no interval.",
    ]


def test_warnings_about_the_run() -> None:
    facts = example.facts()
    run = facts.run.model_copy(update={"status": "interrupted"})
    env = facts.env.model_copy(update={"deterministic": False})
    base = facts.base.model_copy(update={"licence": None})
    found = ids(build_report(changed(run=run, env=env, base=base, gates=())))
    assert {"status", "nondeterministic", "licence", "no-gates"} <= found


def test_warnings_about_the_deliverable() -> None:
    base, pruned, last = example.variants()
    assert last.artifact is not None
    assert last.stage is not None
    metrics = list(last.stage.metrics_per_module)
    metrics[5] = metrics[5].model_copy(update={"loss": 2 * metrics[5].baseline_loss})
    broken = last.model_copy(
        update={
            "size": last.size.model_copy(update={"ratio_total": 0.9}),
            "artifact": last.artifact.model_copy(update={"reload_ok": False}),
            "stage": last.stage.model_copy(update={"metrics_per_module": tuple(metrics)}),
        }
    )
    report = build_report(changed(variants=(base, pruned, broken)))
    assert {f"grew-{LAST}", f"reload-{LAST}", f"worse-than-simple-{LAST}"} <= ids(report)
    assert f"reload-{LAST}" not in {claim.id for claim in report.claims}


@pytest.mark.parametrize(
    "change",
    [
        {"verdict": "PASS"},
        {"headline": "base"},
        {"pareto": ("base",)},
        {"warnings": ()},
        {"fallbacks": ()},
        {"attribution": ()},
        {"gates": ()},
        {"contamination": ()},
    ],
)
def test_a_changed_report_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(VerificationError):
        check_report(example.report().model_copy(update=change))


def test_a_dense_headline_makes_no_claim_about_codes() -> None:
    facts = example.facts()
    evaluations = {k: v for k, v in facts.evaluations.items() if k != LAST}
    report = build_report(changed(variants=facts.variants[:2], evaluations=evaluations))
    assert "matrices" not in {claim.id for claim in report.claims}


def test_the_run_may_name_the_judged_variant() -> None:
    report = build_report(changed(judged="1-prune-depth"))
    assert report.headline == "1-prune-depth"
    assert any("Depth 28 takes 257 MB" in claim.text for claim in report.claims)


def test_a_draft_replaces_nothing_and_says_when_it_does_not_pay() -> None:
    report = build_report(changed(drafts=(example.draft(0.9),)))
    assert report.headline == LAST
    warnings = {warning.id: warning.text for warning in report.warnings}
    assert "do not deploy: 0.90× of plain decoding" in warnings["no-speed-up-4-draft.standalone"]
    assert "prompt lookup" in warnings["lookup-4-draft.standalone"]
    limited = warnings["outlook-4-draft.standalone"]
    assert "what limits it most is the acceptance" in limited
    assert "a target of 310\u202f000\u202f000 parameters" in limited
    claims = {claim.id: claim.text for claim in report.claims}
    assert "of 3 tokens drafted the target takes 1.75" in claims["draft-4-draft.standalone"]
    assert "the same in 7 of 8" in claims["lossless-4-draft.standalone"]
    paying = build_report(changed(drafts=(example.draft(1.4),)))
    assert not [w for w in paying.warnings if w.id.startswith(("no-speed-up", "lookup"))]
    speeds = tuple(
        speed.model_copy(update={"tree": 1.52}) for speed in example.draft(1.4).measurement.speeds
    )
    grown = example.draft(1.4)
    grown = grown.model_copy(
        update={
            "measurement": grown.measurement.model_copy(update={"speeds": speeds}),
            "stage": grown.stage.model_copy(update={"params": {"drafted": 3, "tree_nodes": 15}}),
        }
    )
    claims = {claim.id: claim.text for claim in build_report(changed(drafts=(grown,))).claims}
    assert "a tree of 15 proposals was 1.52× as fast" in claims["tree-4-draft.standalone"]
    assert not [claim for claim in paying.claims if claim.id.startswith("tree")]
    hopeless = example.draft(0.9)
    assert hopeless.outlook is not None
    never = hopeless.outlook.model_copy(update={"paying_parameters": None})
    hopeless = hopeless.model_copy(update={"outlook": never})
    report = build_report(changed(drafts=(hopeless,)))
    assert any("No larger target would change that" in w.text for w in report.warnings)
    head = hopeless.stage.model_copy(update={"method": "draft.eagle3"})
    report = build_report(changed(drafts=(hopeless.model_copy(update={"stage": head}),)))
    assert any("grows with its target" in w.text for w in report.warnings)
    strange = example.draft(1.4).model_copy(update={"target": "nobody"})
    with pytest.raises(ValidationError, match="drafts of unknown variants"):
        Facts.model_validate(changed(drafts=(strange,)).model_dump())


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("quantize.gptq", "round to nearest"),
        ("prune.obs", "deletion that nothing makes up for"),
        ("transform.awq", "the same rounding without the transform"),
    ],
)
def test_a_layer_error_stands_beside_the_simple_method_of_its_kind(method, words) -> None:
    facts = StageFacts(method=method, params={}, seconds=1.0, peak_bytes=1)
    assert facts.simple_method == words
