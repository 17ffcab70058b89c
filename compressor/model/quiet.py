"""Silence for the libraries' progress bars and advice; errors still arrive as exceptions."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm
from transformers.utils import logging


@contextmanager
def quiet() -> Iterator[None]:
    """Within it nobody else draws progress or warns; afterwards all is as before.

    compressed-tensors offers no switch for its bars, so tqdm itself is disabled meanwhile.
    """
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    draw = tqdm.__init__

    def nothing(bar: Any, *args: Any, **options: Any) -> None:
        draw(bar, *args, **{**options, "disable": True})

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tqdm.__init__ = nothing
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            yield
    finally:
        tqdm.__init__ = draw
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
