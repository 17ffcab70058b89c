"""From which size of target a draft that does not pay would."""

from __future__ import annotations

import pytest

from compressor import resources
from compressor.decoding.binding import Kind
from compressor.drafts import outlook
from compressor.model.architecture import Architecture
from compressor.model.files import read_config
from compressor.numerics.speculative import best_drafted, paying_scale
from tests.report import example

TINY = resources.builtin_model("tiny")


def test_the_size_follows_from_the_formula_and_what_it_left_out() -> None:
    measurement = example.draft(0.9).measurement
    speed = measurement.speeds[0]
    shares, cost, verify = (0.5, 0.2, 0.05), speed.draft_cost, speed.verify_costs
    found = outlook(measurement, TINY, "standalone")
    lost = speed.measured / speed.predicted
    scale = paying_scale(shares, cost, verify, 1.05 / lost)
    assert scale is not None
    whole = Architecture.from_config(read_config(TINY)).parameters
    assert found.paying_parameters is not None
    assert abs(found.paying_parameters / (scale * whole) - 1) < 0.05  # two digits
    assert best_drafted(shares, cost / scale, verify)[1] * lost >= 1.05 - 1e-9
    assert found.limit == "acceptance"
    assert found.better_acceptance > max(found.better_cost, found.better_verify)


@pytest.mark.parametrize("kind", ["eagle3", "early_exit"])
def test_a_draft_that_grows_with_its_target_has_no_such_size(kind: Kind) -> None:
    measurement = example.draft(0.9).measurement
    assert outlook(measurement, TINY, kind).paying_parameters is None
