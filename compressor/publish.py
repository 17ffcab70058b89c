"""Publish a run on the Hub: one repository a deliverable, described by `report.json` alone.

    publish(Path("out/run"), "org/name")            # private; the same command again resumes it
    publish(Path("out/run"), "org/name", dry_run=True)

What goes up: the deliverable, a card rendered from the report, its figures, recipe and lock file,
the report itself, and licence files of the original. What never does: calibration and evaluation
text, scores of tokens, anything else of the run's folder. The upload counts as done when what the
Hub gives back is identical to the byte, and loads.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.disk import link_or_copy
from compressor.errors import AccessError, ModelError, UsageError, VerificationError
from compressor.formats.atomic import atomic_write_text
from compressor.formats.files import checkpoint_files
from compressor.formats.sizes import measure
from compressor.hub import Uploads, client, creation_problem, hub_errors
from compressor.licences import licence_gate
from compressor.provenance import combined_sha256, file_sha256, hash_files
from compressor.report.build import build_report
from compressor.report.card import SHOWN, to_markdown
from compressor.report.render import load_report, rendered, to_json
from compressor.report.schema import Artifact, Facts, Report, RoleBytes, Variant
from compressor.report.snippets import load_snippets
from compressor.serving.words import continued, require_engine

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_UPLOADS = "publish.json"
_AT_ROOT = ("recipe.yaml", "recipe.lock.yaml")


@dataclass(frozen=True)
class Repository:
    """One repository as it will be.

    Attributes:
        name: `org/name`.
        artifact: the deliverable that it holds.
        files: path in the repository -> file on this machine, or text.
    """

    name: str
    artifact: Artifact
    files: Mapping[str, Path | str]

    @property
    def bytes(self) -> int:
        """Of everything in it."""
        return sum(
            item.stat().st_size if isinstance(item, Path) else len(item.encode())
            for item in self.files.values()
        )


@dataclass(frozen=True)
class Publication:
    """What was, or with `dry_run` would be, published.

    Attributes:
        repositories: one a deliverable; the first is the headline's.
        public: whether everyone can see them in the end.
        actions: what the licence of the original asked for.
        revisions: repository -> commit or pull request on the Hub; empty for a dry run.
        collection: slug of the collection, where there are several repositories.
    """

    repositories: tuple[Repository, ...]
    public: bool
    actions: tuple[str, ...]
    revisions: Mapping[str, str] = field(default_factory=dict)
    collection: str | None = None


def publish(
    run: Path,
    repo: str,
    *,
    dry_run: bool = False,
    pr: bool = False,
    public: bool = False,
    api: HfApi | None = None,
) -> Publication:
    """Publish the deliverables of a finished run, or say what would be.

    Args:
        run: directory of the run.
        repo: `org/name`; further deliverables go to `org/name-FORMAT`.
        dry_run: touch no network.
        pr: propose the files as a pull request; the same one when the command is repeated.
        public: show the repositories to everyone once they are verified; else they stay private.
        api: the Hub's client; by default with the token of `hf auth login`.

    Raises:
        UsageError: no report, no deliverable, or not a repository's name.
        AccessError: the licence or the Hub forbids it, or there is no token.
        ResourceError: the Hub cannot be reached or failed, or the engine that a graph is tried in
            is not installed; the command can be repeated.
        VerificationError: the run changed since it was verified, or the Hub gave back other bytes.
    """
    planned = plan_publication(run, repo, public=public)
    if dry_run:
        return planned
    for repository in planned.repositories:
        require_engine(repository.artifact.format)
    hub = client(api)
    with hub_errors(repo):
        hub.whoami()
    uploads = Uploads(run / _UPLOADS)
    for repository in planned.repositories:
        with hub_errors(repository.name):
            _publish_one(hub, repository, uploads, run, pr=pr, public=public)
    collection = None
    if len(planned.repositories) > 1:
        with hub_errors(repo):
            collection = _collect(hub, planned, uploads, repo)
    revisions = {r.name: uploads.get(r.name, "revision") for r in planned.repositories}
    return Publication(planned.repositories, public, planned.actions, revisions, collection)


def require_access(
    repo: str, licence: str | None, *, public: bool, api: HfApi | None = None
) -> None:
    """Refuse, before any work, what could not be published after it; changes nothing on the Hub.

    Args:
        repo: `org/name`.
        licence: of the original model, as its card names it.
        public: whether everyone shall see the result.
        api: the Hub's client.

    Raises:
        AccessError: the licence forbids it, there is no token, or it may not write there.
        ResourceError: the Hub cannot be reached.
    """
    licence_gate(licence, repo, public=public)
    hub = client(api)
    with hub_errors(repo):
        identity = hub.whoami()
        if hub.repo_exists(repo):
            hub.auth_check(repo, write=True)
        elif problem := creation_problem(identity, repo):
            raise AccessError(problem, "run `hf auth login` with a token that may write there")


def plan_publication(run: Path, repo: str, *, public: bool) -> Publication:
    """Everything that will be published; reads the run and nothing else.

    Raises:
        UsageError, AccessError, VerificationError: as `publish`.
    """
    if not _REPO.fullmatch(repo):
        raise UsageError(f"{repo!r} is not the name of a repository", "for example org/name")
    report = load_report(run)
    artifacts = report.deliverables or tuple(v.artifact for v in report.variants if v.artifact)
    if not artifacts:
        raise UsageError(f"the run in {run} has no deliverable", "compress export RUN --as gguf")
    actions, extra = licence_gate(report.base.licence, repo, public=public)
    _require_as_verified(run, report)
    repositories = tuple(
        Repository(name, artifact, _files(run, report, artifact, name) | extra)
        for name, artifact in zip(_names(repo, artifacts), artifacts, strict=True)
    )
    return Publication(repositories, public, actions)


def _names(repo: str, artifacts: tuple[Artifact, ...]) -> list[str]:
    return [repo, *(f"{repo}-{Path(artifact.path).name}" for artifact in artifacts[1:])]


def _require_as_verified(run: Path, report: Report) -> None:
    """Only what was read back and compared is published."""
    for name, recorded in report.reproduce.hashes.items():
        path = run / name
        try:
            found = combined_sha256(hash_files(path)) if path.is_dir() else file_sha256(path)
        except (ModelError, OSError):
            found = "missing"
        if found != recorded:
            raise VerificationError(
                f"{path} is not what the report speaks of", f"compress resume {run}"
            )


# ---------------------------------------------------------------------- what a repository holds


def _files(run: Path, report: Report, artifact: Artifact, name: str) -> dict[str, Path | str]:
    folder = run / artifact.path
    own = report_of(report, artifact, folder, name)
    card = to_markdown(own)
    found: dict[str, Path | str] = {
        path.relative_to(folder).as_posix(): path for path in checkpoint_files(folder)
    }
    found |= {
        path: text
        for path, text in rendered(own).items()
        if path.startswith(tuple(f"figures/{key}-" for key in SHOWN)) and path in card
    }
    found |= {file: run / file for file in _AT_ROOT}
    if not _has_own_text(run):
        found["report.json"] = to_json(own)
    return {**found, "README.md": card}


def report_of(report: Report, artifact: Artifact, folder: Path, name: str) -> Report:
    """The report as one deliverable's repository shows it: its size, its name, its snippets."""
    facts = {key: getattr(report, key) for key in Facts.model_fields}
    others, last = _split(report, artifact)
    snippets = load_snippets(name, artifact.format, artifact.load_snippets, hub=True)
    own = artifact.model_copy(update={"path": name, "load_snippets": snippets})
    measured = measure(folder, report.base.logical_params)
    size = last.size.model_copy(
        update={
            **measured.model_dump(exclude={"by_role", "logical_parameters"}),
            "by_role": RoleBytes(**measured.by_role),
            "ratio_total": report.variants[0].size.bytes_on_disk / measured.bytes_on_disk,
        }
    )
    variant = last.model_copy(update={"size": size, "artifact": own, "load_snippets": snippets})
    checks = tuple(check for check in report.engine_checks if check.sha256 == artifact.sha256)
    facts |= {"variants": (*others, variant), "deliverables": (own,), "engine_checks": checks}
    facts["judged"] = variant.id if report.judged else None
    if variant.id != report.headline:  # the gates spoke of another
        facts["gates"] = ()
    for key in ("evaluations", "parent_deltas"):
        kept = {one.id for one in facts["variants"]}
        facts[key] = {name: found for name, found in facts[key].items() if name in kept}
    return build_report(Facts(**facts))


def _split(report: Report, artifact: Artifact) -> tuple[list[Variant], Variant]:
    """The variants that led to a deliverable, and the one that it is.

    One that a second quantizer made is a variant of its own; the others are the last stage's.
    """
    stages = [one for one in report.variants if not (one.artifact and one.artifact.quantizer)]
    if artifact.quantizer is None:
        return stages[:-1], stages[-1]
    return stages, next(
        one for one in report.variants if one.artifact and one.artifact.path == artifact.path
    )


def _has_own_text(run: Path) -> bool:
    """Whether the report quotes text of the user's, in its worst tokens."""
    from ruamel.yaml import YAML

    recipe = YAML(typ="safe").load(run / "recipe.lock.yaml")
    return bool((recipe.get("evaluate") or {}).get("text"))


# ---------------------------------------------------------------------- the Hub


def _publish_one(
    api: HfApi, repository: Repository, uploads: Uploads, run: Path, *, pr: bool, public: bool
) -> None:
    """Create, upload, read back, and only then show it."""
    name = repository.name
    api.create_repo(name, private=True, exist_ok=True)
    api.auth_check(name, write=True)
    branch = _branch(api, name, uploads) if pr else "main"
    folder = run / "publish" / name.replace("/", "--")
    _stage(repository, folder)
    commit = api.upload_folder(
        repo_id=name,
        folder_path=folder,
        revision=branch,
        commit_message=f"{repository.artifact.format} by compressor",
    )
    revision = commit.oid or branch
    uploads.put(name, "revision", revision)
    _prove(api, name, revision, folder)
    shutil.rmtree(folder, ignore_errors=True)
    if public and not pr:
        api.update_repo_settings(name, private=False)


def _branch(api: HfApi, name: str, uploads: Uploads) -> str:
    """The branch of the pull request, opened once and remembered."""
    if not uploads.get(name, "pull_request"):
        request = api.create_pull_request(name, title="Compressed model", repo_type="model")
        uploads.put(name, "pull_request", f"refs/pr/{request.num}")
    return uploads.get(name, "pull_request")


def _stage(repository: Repository, folder: Path) -> None:
    """The files of a repository in a folder of their own; big ones are linked."""
    shutil.rmtree(folder, ignore_errors=True)
    for path, item in repository.files.items():
        target = folder / path
        if isinstance(item, str):
            atomic_write_text(target, item)
            continue
        link_or_copy(item, target)


def _prove(api: HfApi, name: str, revision: str, folder: Path) -> None:
    """Download what was uploaded, compare every byte, load it and write a few tokens."""
    with tempfile.TemporaryDirectory(prefix="compress-publish-") as work:
        found = Path(api.snapshot_download(name, revision=revision, local_dir=work))
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            there = found / path.relative_to(folder)
            if not there.is_file() or file_sha256(there) != file_sha256(path):
                raise VerificationError(
                    f"{name} at {revision}: {there.relative_to(found)} is not what was uploaded"
                )
        continued(found)


def _collect(api: HfApi, planned: Publication, uploads: Uploads, repo: str) -> str:
    """A collection of all repositories; the one of an earlier attempt is used again."""
    slug = uploads.get(repo, "collection")
    if not slug:
        namespace, title = repo.split("/")
        made = api.create_collection(
            title, namespace=namespace, private=not planned.public, exists_ok=True
        )
        slug = made.slug
        uploads.put(repo, "collection", slug)
    for repository in planned.repositories:
        api.add_collection_item(slug, repository.name, "model", exists_ok=True)
    return slug


def summary(publication: Publication) -> dict[str, Any]:
    """A publication for a program."""
    return {
        "public": publication.public,
        "actions": list(publication.actions),
        "collection": publication.collection,
        "repositories": [
            {
                "name": repository.name,
                "format": repository.artifact.format,
                "bytes": repository.bytes,
                "files": sorted(repository.files),
                "revision": publication.revisions.get(repository.name),
            }
            for repository in publication.repositories
        ],
    }
