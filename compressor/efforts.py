"""One recipe at several efforts: a part of a recipe, merged over the rest of its file.

    calibration: {samples: 128}
    stages: [{method: quantize.gptq, bits: 4}]
    efforts:
      light: {calibration: {samples: 32}}         # `compress RECIPE MODEL --effort light`

Mappings are merged key by key; anything else, lists too, replaces what stands above, so that an
effort that changes a stage shows all stages that will run; null removes a key (JSON Merge Patch,
RFC 7396). Every value keeps the line and column at which it was written.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from typing import Any, Literal

from compressor.source import Location, Source

EffortName = Literal["light", "default", "best"]
DEFAULT: EffortName = "default"
KEY = "efforts"

_NAMES: tuple[EffortName, ...] = ("light", "best")
_Places = dict[Location, tuple[int, int]]


def apart(source: Source) -> dict[EffortName, Source]:
    """The recipe as it stands and at every effort that it writes out, none sharing data.

    Args:
        source: as read; what is no mapping under `efforts` is left for validation to report.

    Returns:
        `light`, `default` and `best`, those that there are, in this order. Only `default` keeps
        the key `efforts`.
    """
    found: dict[EffortName, Source] = {DEFAULT: replace(source, data=deepcopy(source.data))}
    written = source.data.get(KEY) if isinstance(source.data, dict) else None
    for name in _NAMES:
        if isinstance(written, dict) and isinstance(written.get(name), dict):
            found[name] = _merged(source, name)
    order: tuple[EffortName, ...] = ("light", DEFAULT, "best")
    return {name: found[name] for name in order if name in found}


def _merged(source: Source, name: EffortName) -> Source:
    """The recipe with what stands under `efforts.NAME` in its place."""
    data = deepcopy({key: value for key, value in source.data.items() if key != KEY})
    keys, values = dict(source.keys), dict(source.values)
    merge = _Merge(source, (KEY, name), keys, values)
    merge.lay(data, source.data[KEY][name], ())
    return replace(source, data=data, keys=keys, values=values, overrides={})


class _Merge:
    """Lays a part of a document over the rest, with the places at which values were written."""

    def __init__(self, source: Source, root: Location, keys: _Places, values: _Places) -> None:
        self._tables = ((source.keys, keys), (source.values, values))
        self._root = root

    def lay(self, below: dict[str, Any], patch: Mapping[str, Any], at: Location) -> None:
        for key, value in patch.items():
            place = (*at, key)
            if not (isinstance(value, dict) and isinstance(below.get(key), dict)):
                below.pop(key, None)
                self._move(place)
            if isinstance(value, dict):
                self.lay(below.setdefault(key, {}), value, place)
            elif value is not None:
                below[key] = deepcopy(value)

    def _move(self, place: Location) -> None:
        """From now on a place is where the effort wrote it."""
        written = (*self._root, *place)
        for source, table in self._tables:
            for old in [at for at in table if at[: len(place)] == place]:
                del table[old]
            for at, where in source.items():
                if at[: len(written)] == written:
                    table[at[len(self._root) :]] = where
