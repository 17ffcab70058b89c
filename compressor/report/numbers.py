"""Numbers for people: units, significant digits and intervals, one way everywhere.

Sizes are decimal (1 MB = 10⁶ bytes), as file managers and the Hub count. A value with an
interval is rounded where the interval's second digit stands, since finer digits are noise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Any

from compressor.evaluation.results import Estimate
from compressor.report.schema import Style

MINUS = "−"
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def fixed(value: float, decimals: int, signed: bool = False) -> str:
    """`value` with that many decimals, a real minus sign, and never a negative zero."""
    rounded = round(value, decimals) + 0.0
    text = f"{rounded:+.{decimals}f}" if signed and rounded else f"{rounded:.{decimals}f}"
    return text.replace("-", MINUS)


def power(exponent: int) -> str:
    """A power of ten such as 10⁻³."""
    return "10" + str(exponent).translate(_SUPERSCRIPT)


def _magnitude(value: float, digits: int) -> int:
    """Decimal exponent after rounding: 0.9996 with three digits is 1.00, of magnitude 0."""
    return int(f"{value:.{digits - 1}e}".partition("e")[2])


def _over_power(value: float, exponent: int) -> float:
    """value / 10**exponent, also where that power is too small for a float."""
    return float(Decimal(value).scaleb(-exponent))


def decimals_for(scale: float, digits: int) -> int:
    """Decimals that show `digits` significant digits of a number as large as `scale`."""
    return max(0, digits - 1 - _magnitude(scale, digits)) if scale else digits - 1


def number(value: float, digits: int = 3) -> str:
    """`value` with significant digits; powers of ten outside 0.0001 to 100 000."""
    if value == 0:
        return "0"
    magnitude = _magnitude(value, digits)
    if magnitude < -4 or magnitude > 5:
        return f"{fixed(_over_power(value, magnitude), digits - 1)} × {power(magnitude)}"
    return fixed(value, max(0, digits - 1 - magnitude))


def _interval_decimals(estimate: Estimate) -> int | None:
    if estimate.low is None or estimate.high is None or estimate.high <= estimate.low:
        return None
    return min(8, decimals_for((estimate.high - estimate.low) / 2, 2))


def value_of(estimate: Estimate, signed: bool = False) -> str:
    """The value alone, rounded where its interval says."""
    if _tiny(estimate):
        return number(estimate.value)
    decimals = _interval_decimals(estimate)
    if decimals is None:
        decimals = min(8, decimals_for(estimate.value, 3))
    return fixed(estimate.value, decimals, signed)


def _tiny(estimate: Estimate) -> bool:
    ends = (estimate.value, estimate.low or 0.0, estimate.high or 0.0)
    return 0 < max(abs(end) for end in ends) < 1e-4


def _scaled(estimate: Estimate, exponent: int) -> Estimate:
    low, high = (
        None if end is None else _over_power(end, exponent) for end in (estimate.low, estimate.high)
    )
    return Estimate(value=_over_power(estimate.value, exponent), low=low, high=high)


def plus_minus(estimate: Estimate, signed: bool = False) -> str:
    """Value ± half the width of the 95 % interval; the value alone without an interval."""
    if _tiny(estimate) and estimate.value:
        exponent = _magnitude(estimate.value, 3)
        return f"({plus_minus(_scaled(estimate, exponent), signed)}) × {power(exponent)}"
    decimals = _interval_decimals(estimate)
    if decimals is None or estimate.low is None or estimate.high is None:
        return value_of(estimate, signed)
    half = fixed((estimate.high - estimate.low) / 2, decimals)
    return f"{value_of(estimate, signed)} ± {half}"


def limits(estimate: Estimate, signed: bool = False) -> str:
    """The two ends of the 95 % interval, or a dash."""
    if estimate.low is None or estimate.high is None:
        return "–"
    if _tiny(estimate):
        return f"{number(estimate.low)} to {number(estimate.high)}"
    decimals = _interval_decimals(estimate)
    if decimals is None:
        decimals = min(8, decimals_for(estimate.low, 3))
    return f"{fixed(estimate.low, decimals, signed)} to {fixed(estimate.high, decimals, signed)}"


def with_limits(estimate: Estimate, signed: bool = False) -> str:
    """The value and its interval, for a sentence."""
    if estimate.low is None or estimate.low == estimate.high:
        return value_of(estimate, signed)
    return f"{value_of(estimate, signed)} (95 % interval {limits(estimate, signed)})"


def size(count: float) -> str:
    """Bytes in decimal units with three significant digits."""
    value, units = float(count), ["B", "kB", "MB", "GB", "TB"]
    while abs(value) >= 999.5 and len(units) > 1:
        value, units = value / 1000, units[1:]
    decimals = 0 if units[0] == "B" else max(0, decimals_for(value, 3))
    return f"{fixed(value, decimals)} {units[0]}"


def round_size(count: float) -> str:
    """A round number of bytes, as on an axis, without trailing zeros."""
    value, _, unit = size(count).partition(" ")
    return f"{value.rstrip('0').rstrip('.') if '.' in value else value} {unit}"


def size_change(count: float) -> str:
    """A difference of bytes, with its sign."""
    return f"+{size(count)}" if count > 0 else size(count)


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 60:
        return f"{fixed(seconds, 1)} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def count(value: float) -> str:
    """An integer with thin spaces between thousands."""
    return f"{round(value):,}".replace(",", "\u202f")


def share(value: float) -> str:
    """A share in percent."""
    return f"{fixed(100 * value, 1)}\u00a0%"


def level_digits(values: Sequence[float]) -> Callable[[float], str]:
    """Prints each of the values exactly and all of them with the same decimals."""
    decimals = next(
        (d for d in range(8) if all(abs(round(v, d) - v) < 1e-6 * abs(v) for v in values if v)), 8
    )
    return lambda value: fixed(value, decimals)


def plain(value: float) -> str:
    """A number of unknown kind: whole ones as they are, others with four digits."""
    return count(value) if float(value).is_integer() else number(value, 4)


def moment(iso: str) -> str:
    """An ISO 8601 time to the minute."""
    return f"{iso[:16].replace('T', ' ')} UTC"


def ratio(value: float) -> str:
    """A factor."""
    return f"{fixed(value, 2)}×"


def bits(value: float) -> str:
    """Bits per weight."""
    return fixed(value, 2)


def _estimate(value: dict[str, Any]) -> str:
    return with_limits(Estimate(**value))


def _delta(value: dict[str, Any]) -> str:
    return with_limits(Estimate(**value), signed=True)


_STYLES: dict[Style, Callable[[Any], str]] = {
    "text": str,
    "bytes": size,
    "ratio": ratio,
    "count": count,
    "bits": bits,
    "share": share,
    "seconds": duration,
    "number": number,
    "estimate": _estimate,
    "delta": _delta,
}


def shown(value: Any, style: Style) -> str:
    """A value of the report as a sentence prints it."""
    return _STYLES[style](value)
