"""Where the data that ships with the package lies.

In a checkout the folders stand at the top of the repository, for people to read and edit;
an installed wheel carries them inside the package.
"""

from __future__ import annotations

from pathlib import Path

from compressor.errors import ModelError

_PACKAGE = Path(__file__).resolve().parent
_DATA = _PACKAGE / "data" if (_PACKAGE / "data").is_dir() else _PACKAGE.parent
_BUILTIN = _PACKAGE / "builtin"


def recipes() -> Path:
    """Folder of the shipped recipes."""
    return _DATA / "recipes"


def calibration() -> Path:
    """Folder of the calibration text, its manifest and the mixes."""
    return _DATA / "calibration"


def evals() -> Path:
    """Folder of the evaluation text and suites."""
    return _DATA / "evals"


def builtin_model(name: str) -> Path:
    """Folder of the model `builtin:<name>`.

    Raises:
        ModelError: no such model ships.
    """
    folder = _BUILTIN / name
    if not (folder / "config.json").is_file():
        shipped = sorted(path.parent.name for path in _BUILTIN.glob("*/config.json"))
        raise ModelError(f"no built-in model {name!r}", f"built in: {', '.join(shipped)}")
    return folder
