from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from .helpers import tiny_model


@pytest.fixture(scope="session", autouse=True)
def _quiet() -> Iterator[None]:
    patch = pytest.MonkeyPatch()
    patch.setenv("TQDM_DISABLE", "1")
    yield
    patch.undo()


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    tiny_model("Llama", tie_word_embeddings=False).save_pretrained(folder)
    (folder / "chat_template.jinja").write_text("{{ messages }}\r\n", newline="")
    return folder


@pytest.fixture(scope="session")
def tied_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tied")
    tiny_model("Llama", tie_word_embeddings=True).save_pretrained(folder)
    return folder
