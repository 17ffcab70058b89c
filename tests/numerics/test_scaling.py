"""Scales: closed forms, brute force over the grid of candidates, folding to the last bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compressor.errors import NumericalError
from compressor.numerics.hessian import HessianAccumulator
from compressor.numerics.rtn import rtn
from compressor.numerics.scaling import (
    MagnitudeAccumulator,
    best_scale,
    candidates,
    fold_norm,
    int8_output_error,
    output_error,
    rounded_at,
    shortlist,
    smoothing_scale,
    spread_heads,
    tie_heads,
    weight_magnitude,
)
from compressor.types import WeightScheme

W3 = WeightScheme(3, 16)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer(out: int = 24, width: int = 32, tokens: int = 200) -> tuple[Tensor, Tensor]:
    """A weight and inputs of which every eighth channel is large."""
    size = torch.ones(width)
    size[::8] = 20.0
    return normal(out, width), normal(tokens, width, seed=1) * size


def round_scaled(weight: Tensor, scale: Tensor) -> Tensor:
    return rounded_at(
        weight, scale, W3, search="minmax", energy=torch.ones(32), dtype=torch.float32
    )


# ---------------------------------------------------------------------- candidates


def test_candidates_are_powers_of_the_inputs_balanced_about_one() -> None:
    inputs = torch.tensor([0.25, 1.0, 4.0, 1.0])
    found = list(candidates(inputs, (None,), 3))
    assert torch.equal(found[0], torch.ones(4))
    torch.testing.assert_close(found[1], inputs.sqrt())  # √(max·min) is 1 already
    torch.testing.assert_close(found[2], inputs)
    assert len(found) == 3


def test_candidates_divide_by_powers_of_the_weights() -> None:
    inputs, weights = normal(16).abs() + 0.1, normal(16, seed=1).abs() + 0.1
    found = list(candidates(inputs, (weights,), 5))
    assert len(found) == 6
    for step, scale in enumerate(found[1:]):
        r = step / 4
        expected = inputs.double() ** r / (weights.double() ** (1 - r) + 1e-4)
        expected /= (expected.max() * expected.min()).sqrt()
        torch.testing.assert_close(scale.double(), expected, rtol=1e-5, atol=0)
        assert scale.max() * scale.min() == pytest.approx(1, rel=1e-5)


def test_a_dead_input_is_not_scaled_away() -> None:
    inputs = torch.tensor([0.0, 0.5, 2.0])
    for scale in candidates(inputs, (None,), 4):
        assert torch.isfinite(scale).all()
        assert scale[0] == scale[1]
    assert len(list(candidates(torch.zeros(3), (None,), 4))) == 1


@pytest.mark.parametrize("group", [None, 4])
def test_weight_magnitude_by_hand(group: int | None) -> None:
    weights = [normal(3, 8), normal(2, 8, seed=1)]
    rows = [row for weight in weights for row in weight.abs().tolist()]
    size = group or 8
    expected = [
        sum(row[j] / max(row[j // size * size : (j // size + 1) * size]) for row in rows) / 5
        for j in range(8)
    ]
    torch.testing.assert_close(weight_magnitude(weights, group), torch.tensor(expected))


def test_weight_magnitude_of_an_empty_group_is_zero() -> None:
    assert not weight_magnitude([torch.zeros(2, 4)], 2).any()


# ---------------------------------------------------------------------- the search


def test_the_search_finds_what_brute_force_on_the_tokens_finds() -> None:
    weight, inputs = layer()
    moments = HessianAccumulator(32)
    moments.add(inputs)
    hessian = moments.matrix()
    sizes = MagnitudeAccumulator(32)
    sizes.add(inputs)
    divisors = (None, weight_magnitude([weight], 16))
    found = best_scale(
        candidates(sizes.mean, divisors, 11),
        lambda scale: output_error([weight], [round_scaled(weight, scale)], hessian),
    )
    tried = list(candidates(inputs.abs().mean(0), divisors, 11))
    losses = []
    for scale in tried:
        rounded = rtn(weight * scale, W3, scale_dtype=torch.float32).dequantize()
        output = (inputs / scale).double() @ rounded.double().T
        losses.append(float((output - inputs.double() @ weight.double().T).square().sum()))
    best = min(range(len(tried)), key=losses.__getitem__)
    assert best != 0
    assert found.scale is not None
    torch.testing.assert_close(found.scale, tried[best])
    assert found.loss == pytest.approx(losses[best] * 2 / len(inputs), rel=1e-3)
    assert found.loss < 0.6 * found.identity_loss  # outliers are what AWQ is for


def test_the_identity_stays_unless_something_is_strictly_better() -> None:
    scales = [torch.ones(2), torch.full((2,), 2.0), torch.full((2,), 3.0)]
    losses = iter([1.0, float("nan"), 1.0])
    found = best_scale(scales, lambda _: next(losses))
    assert found.scale is None
    assert found.loss == found.identity_loss == 1.0


def test_among_equals_the_first_wins() -> None:
    scales = [torch.ones(1), torch.full((1,), 2.0), torch.full((1,), 3.0)]
    losses = iter([1.0, 0.5, 0.5])
    assert best_scale(scales, lambda _: next(losses)).scale is scales[1]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_identity_without_a_loss_is_an_error(bad: float) -> None:
    with pytest.raises(NumericalError, match="not finite"):
        best_scale([torch.ones(1)], lambda _: bad)


def test_a_shortlist_has_the_identity_and_the_best_in_their_order() -> None:
    scales = [torch.full((1,), float(i)) for i in range(6)]
    rough = {1: 3.0, 2: float("nan"), 3: 1.0, 4: 4.0, 5: 2.0}  # the identity's is not asked for
    found = [int(scale) for scale in shortlist(scales, lambda scale: rough[int(scale)], 2)]
    assert found == [0, 3, 5]
    everything = [int(scale) for scale in shortlist(scales, lambda scale: rough[int(scale)], 9)]
    assert everything == [0, 1, 2, 3, 4, 5]
    assert [int(scale) for scale in shortlist(scales[:1], lambda _: 0.0, 2)] == [0]


@pytest.mark.parametrize("symmetry", ["symmetric", "full_range", "asymmetric"])
def test_more_tries_find_no_worse_grid_than_no_search(symmetry) -> None:
    weight, inputs = layer()
    scheme, energy = WeightScheme(3, 16, symmetry), inputs.square().mean(0)
    errors = []
    for search, tries in (("minmax", 24), ("imatrix", 6), ("imatrix", 24)):
        options = {"search": search, "importance": energy, "tries": tries}
        rounded = rtn(weight, scheme, scale_dtype=torch.float32, **options).dequantize()
        errors.append(float(((rounded - weight).square() * energy).sum()))
    assert errors[1] < errors[0]
    assert errors[2] < errors[0]
    assert errors[1] < 1.25 * errors[2]


def test_scaling_by_one_number_rounds_to_the_same_weights() -> None:
    weight, _ = layer()
    same = rtn(weight, W3, scale_dtype=torch.float32).dequantize()
    assert torch.equal(round_scaled(weight, torch.ones(32)), same)
    assert torch.equal(round_scaled(weight, torch.full((32,), 8.0)), same)
    assert not torch.equal(round_scaled(weight, torch.linspace(1, 2, 32)), same)


@pytest.mark.parametrize("search", ["minmax", "mse", "imatrix"])
@pytest.mark.parametrize("symmetry", ["symmetric", "full_range", "asymmetric"])
def test_rounding_follows_the_scale_of_a_row(search, symmetry) -> None:
    """Dividing a producer's rows by s does not change how they round: edges do not interact."""
    weight, _ = layer()
    rows = torch.tensor([0.25, 1.0, 2.0, 8.0]).repeat(6).unsqueeze(1)
    scheme, importance = WeightScheme(3, 16, symmetry), torch.linspace(1, 2, 32)
    options = {"search": search, "importance": importance, "scale_dtype": torch.bfloat16}
    plain = rtn(weight, scheme, **options).dequantize()
    scaled = rtn(weight * rows, scheme, **options).dequantize()
    assert torch.equal(scaled.float() / rows, plain.float())


def test_an_imatrix_grid_weighs_with_the_scaled_inputs() -> None:
    weight, inputs = layer()
    energy, scale = inputs.square().mean(0), torch.linspace(0.5, 2, 32)
    found = rounded_at(weight, scale, W3, search="imatrix", energy=energy, dtype=torch.float32)
    right, wrong = (
        rtn(weight * scale, W3, search="imatrix", importance=i, scale_dtype=torch.float32)
        for i in ((inputs / scale).square().mean(0), energy)
    )
    torch.testing.assert_close(found, right.dequantize() / scale)
    assert not torch.allclose(found, wrong.dequantize() / scale)


# ---------------------------------------------------------------------- statistics


def test_magnitudes_over_batches() -> None:
    inputs = normal(50, 8)
    sizes = MagnitudeAccumulator(8)
    for part in (inputs[:7], inputs[7:7], inputs[7:]):
        sizes.add(part)
    torch.testing.assert_close(sizes.mean, inputs.abs().mean(0))
    torch.testing.assert_close(sizes.energy, inputs.square().mean(0))
    assert torch.equal(sizes.peak, inputs.abs().amax(0))
    assert sizes.tokens == 50
    with pytest.raises(NumericalError, match="NaN"):
        sizes.add(torch.full((1, 8), float("nan")))


# ---------------------------------------------------------------------- folding


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_folded_norm_and_its_scale_multiply_back_exactly(offset: float, dtype) -> None:
    weight = normal(64).to(dtype)
    scale = normal(64, seed=1).exp()
    stored, exact = fold_norm(weight, scale, offset=offset, dtype=dtype)
    assert stored.dtype == dtype
    back = (stored.double() + offset) * exact.double()
    torch.testing.assert_close(back, weight.double() + offset, rtol=1e-6, atol=0)
    torch.testing.assert_close(exact, scale, rtol=0.5 if dtype != torch.float32 else 1e-5, atol=0)
    if dtype == torch.bfloat16:  # the scale as asked for would leave the rounding in
        asked = (stored.double() + offset) * scale.double()
        assert not torch.allclose(asked, weight.double() + offset, rtol=1e-4, atol=0)


def test_a_norm_of_zero_is_left_alone() -> None:
    weight = torch.tensor([0.0, 2.0])
    stored, exact = fold_norm(weight, torch.tensor([3.0, 4.0]), offset=0.0, dtype=torch.float32)
    assert stored.tolist() == [0.0, 0.5]
    assert exact.tolist() == [1.0, 4.0]


def test_a_norm_that_would_vanish_is_left_alone() -> None:
    stored, exact = fold_norm(
        torch.tensor([1e-7]), torch.tensor([1e4]), offset=0.0, dtype=torch.float16
    )
    assert stored.item() > 0
    assert exact.item() == 1.0


def test_query_heads_share_the_scale_of_their_value() -> None:
    values = torch.arange(12.0)  # 2 key-value heads, 3 query heads each, 2 channels
    assert tie_heads(values, 2, 3).tolist() == [2.0, 3.0, 8.0, 9.0]
    spread = spread_heads(torch.tensor([1.0, 2.0, 3.0, 4.0]), 2, 3)
    assert spread.tolist() == [1, 2, 1, 2, 1, 2, 3, 4, 3, 4, 3, 4]
    assert torch.equal(tie_heads(spread, 2, 3), torch.tensor([1.0, 2.0, 3.0, 4.0]))


# ---------------------------------------------------------------------- SmoothQuant


def test_half_way_smoothing_makes_both_ranges_equal() -> None:
    weight, inputs = layer()
    peak, columns = inputs.abs().amax(0), weight.abs().amax(0)
    scale = smoothing_scale(peak, columns, 0.5)
    torch.testing.assert_close(peak / scale, columns * scale)
    torch.testing.assert_close(smoothing_scale(peak, columns, 1.0), peak)
    torch.testing.assert_close(smoothing_scale(peak, columns, 0.0), 1 / columns)
    assert smoothing_scale(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0]), 0.5).tolist() == [
        1.0,
        1.0,
    ]


def test_int8_error_by_hand_and_what_smoothing_does_to_it() -> None:
    weight, inputs = layer()
    plain = int8_output_error(inputs, [weight], torch.ones(32))
    step = inputs.abs().amax(1, keepdim=True) / 127
    grid = weight.abs().amax(1, keepdim=True) / 127
    output = ((inputs / step).round() * step) @ ((weight / grid).round() * grid).T
    exact = inputs @ weight.T
    expected = float((output - exact).square().sum() / exact.square().sum())
    assert plain == pytest.approx(expected, rel=1e-4)
    inputs[:, ::8] *= 5  # outliers
    rough = int8_output_error(inputs, [weight], torch.ones(32))
    scale = smoothing_scale(inputs.abs().amax(0), weight.abs().amax(0), 0.5)
    assert int8_output_error(inputs, [weight], scale) < 0.5 * rough
    assert int8_output_error(torch.zeros(2, 32), [weight], torch.ones(32)) == 0.0
