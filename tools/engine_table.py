"""Write the table of engines into the documents that have a place for it.

    python tools/engine_table.py

The table is `compressor/formats/capabilities.py`; a document has it between two comments,
`<!-- engines: written by tools/engine_table.py -->` and `<!-- /engines -->`.
"""

from __future__ import annotations

from pathlib import Path

from compressor.formats.capability_table import replaced

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = (ROOT / "docs" / "engines.md", ROOT / "README.md")


def main() -> None:
    """Bring every document up to date."""
    for path in DOCUMENTS:
        path.write_text(replaced(path.read_text("utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
