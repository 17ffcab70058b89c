from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

import jsonschema
import pytest
from pydantic import ValidationError

from compressor.evaluation.results import Estimate
from compressor.report.render import to_json
from compressor.report.schema import SCHEMA_VERSION, Facts, Report, json_schema
from compressor.types import Fallback, ModuleMetric
from tests.report import example


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return json.loads(to_json(example.report()))


def validator() -> jsonschema.Draft202012Validator:
    jsonschema.Draft202012Validator.check_schema(json_schema())
    return jsonschema.Draft202012Validator(json_schema())


def test_written_report_validates(document: dict[str, Any]) -> None:
    validator().validate(document)
    assert document["schema_version"] == SCHEMA_VERSION
    assert next(iter(document)) == "schema_version"


def test_published_schema_is_the_one_of_the_code() -> None:
    published = files("compressor.report").joinpath("report.schema.json").read_text("utf-8")
    assert json.loads(published) == json_schema(), "write json_schema() to report.schema.json again"


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("run", "seed"), "zero"),
        (("verdict",), "MAYBE"),
        (("variants", 2, "size", "bytes_on_disk"), None),
        (("schema_version",), "2.0.0"),
        (("claims", 0, "evidence", 0, "style"), "guess"),
        (("run", "surprise"), 1),
        (("variants", 1, "stage", "extra"), 1),
    ],
)
def test_broken_documents_fail_both_validators(
    document: dict[str, Any], path: tuple[Any, ...], value: object
) -> None:
    broken = json.loads(json.dumps(document))
    place = broken
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    assert list(validator().iter_errors(broken))
    with pytest.raises(ValidationError):
        Report.model_validate(broken)


def test_written_types_follow_the_types_of_the_stages() -> None:
    metric = ModuleMetric(
        module="model.layers.0.mlp.up_proj", bits=4.25, loss=1e-3, baseline_loss=2e-3
    )
    fallback = Fallback(module="lm_head", reason="tied", action="left as it is")
    stage = example.variants()[2].stage
    assert stage is not None
    copied = type(stage).model_validate(
        {**stage.model_dump(), "metrics_per_module": [vars(metric)], "fallbacks": [vars(fallback)]}
    )
    assert vars(copied.metrics_per_module[0]) == vars(metric)
    assert vars(copied.fallbacks[0]) == vars(fallback)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_are_finite(bad: float) -> None:
    facts = example.facts()
    with pytest.raises(ValidationError, match="finite"):
        Facts.model_validate({**dict(facts), "parent_deltas": {"base": Estimate(value=bad)}})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: {"variants": (*v, v[1])}, "unique"),
        (lambda v: {"variants": v[1:]}, "must be the base"),
        (lambda v: {"variants": (v[0], v[2], v[1])}, "earlier parent"),
        (lambda v: {"variants": v[:2]}, "unknown variants"),
    ],
)
def test_references_resolve(change: Any, message: str) -> None:
    facts = example.facts()
    with pytest.raises(ValidationError, match=message):
        Facts.model_validate({**dict(facts), **change(facts.variants)})
