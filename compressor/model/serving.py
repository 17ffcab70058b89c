"""What `config.json` says of the model while it runs, which weights cannot show: roundings."""

from __future__ import annotations

import math
from collections.abc import Mapping

from compressor.errors import ModelError
from compressor.types import ACTIVATIONS, ActivationScheme, CacheScheme, activation_scheme

SERVING = "compressor"
"""Key of `config.json` for what happens while the model runs, which weights cannot show."""


def serving_config(
    config: Mapping[str, object], activations: Mapping[str, ActivationScheme]
) -> dict[str, object]:
    """The configuration of a model whose inputs are rounded like this, and like that so far."""
    every = {**rounded_inputs(config), **activations}
    if not every:
        return dict(config)
    by_name: dict[str, list[str]] = {}
    for module in sorted(every):
        by_name.setdefault(every[module].name, []).append(module)
    return _served(config, activations=by_name)


def cache_config(config: Mapping[str, object], cache: CacheScheme) -> dict[str, object]:
    """The configuration of a model that rounds keys and values like this."""
    scales = [list(pair) for pair in cache.scales]
    return _served(config, cache={"format": cache.name, "scales": scales})


def _served(config: Mapping[str, object], **facts: object) -> dict[str, object]:
    serving = config.get(SERVING, {})
    known = serving if isinstance(serving, Mapping) else {}
    return {**config, SERVING: {**known, **facts}}


def rounded_cache(config: Mapping[str, object], layers: int) -> CacheScheme | None:
    """What `cache_config` wrote.

    Raises:
        ModelError: it is something else, or a scale is no positive number.
    """
    serving = config.get(SERVING, {})
    found = serving.get("cache") if isinstance(serving, Mapping) else None
    if found is None:
        return None
    scales = found.get("scales") if isinstance(found, Mapping) else None
    if not isinstance(scales, list) or found.get("format") != CacheScheme.name:
        raise ModelError(f"config.json has {found!r} as the rounding of the cache; known is: fp8")
    pairs = [pair for pair in scales if isinstance(pair, list) and len(pair) == 2]
    if not len(pairs) == len(scales) == layers:
        raise ModelError(f"config.json has {len(scales)} scales of the cache for {layers} blocks")
    for index, pair in enumerate(pairs):
        if not all(isinstance(scale, int | float) and 0 < scale < math.inf for scale in pair):
            raise ModelError(f"config.json: the scales {pair} of block {index}'s cache are no use")
    return CacheScheme(tuple((float(keys), float(values)) for keys, values in pairs))


def rounded_inputs(config: Mapping[str, object]) -> dict[str, ActivationScheme]:
    """What `serving_config` wrote.

    Raises:
        ModelError: it is something else.
    """
    serving = config.get(SERVING, {})
    found = serving.get("activations", {}) if isinstance(serving, Mapping) else None
    names = found if isinstance(found, Mapping) else {"": ()}
    schemes = {name: activation_scheme(name) for name in names}
    if not all(schemes.values()):
        raise ModelError(
            f"config.json has {found!r} as the rounding of inputs; "
            f"known are: {', '.join(ACTIVATIONS)} and llm-int8 with a threshold"
        )
    return {module: scheme for name, scheme in schemes.items() if scheme for module in names[name]}
