"""Publish a run on the Hub: one repository a deliverable, described by `report.json` alone.

    publish(Path("out/run"), "org/name")            # private; the same command again resumes it
    publish(Path("out/run"), "org/name", dry_run=True)

What goes up: the deliverable, a card rendered from the report, its figures, recipe and lock file,
the report itself, and licence files of the original. What never does: calibration and evaluation
text, scores of tokens, anything else of the run's folder. The upload counts as done when what the
Hub gives back is identical to the byte, and loads.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor import reload
from compressor.errors import AccessError, ModelError, ResourceError, UsageError, VerificationError
from compressor.formats.atomic import atomic_write_json, atomic_write_text
from compressor.formats.files import GRAPHS, checkpoint_files
from compressor.formats.headers import read_json
from compressor.formats.sizes import measure
from compressor.provenance import combined_sha256, file_sha256, hash_files
from compressor.report.build import build_report
from compressor.report.card import SHOWN, to_markdown
from compressor.report.render import load_report, rendered, to_json
from compressor.report.schema import Artifact, Facts, Report, RoleBytes, Variant
from compressor.report.snippets import load_snippets

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_STATE = "publish.json"
_AT_ROOT = ("recipe.yaml", "recipe.lock.yaml")
_NO_DERIVATIVES = re.compile(r"(^|-)nd(-|$)")
_LLAMA = re.compile(r"llama-?[34]")
_GEMMA_NOTICE = (
    "Gemma is provided under and subject to the Gemma Terms of Use found at "
    "ai.google.dev/gemma/terms\n"
)


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
        ResourceError: the Hub cannot be reached or failed; the command can be repeated.
        VerificationError: the run changed since it was verified, or the Hub gave back other bytes.
    """
    planned = plan_publication(run, repo, public=public)
    if dry_run:
        return planned
    client = _client(api)
    with _hub_errors(repo):
        client.whoami()
    state = _State(run / _STATE)
    for repository in planned.repositories:
        with _hub_errors(repository.name):
            _publish_one(client, repository, state, run, pr=pr, public=public)
    collection = None
    if len(planned.repositories) > 1:
        with _hub_errors(repo):
            collection = _collect(client, planned, state, repo)
    revisions = {r.name: state.get(r.name, "revision") for r in planned.repositories}
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
    client = _client(api)
    with _hub_errors(repo):
        identity = client.whoami()
        if client.repo_exists(repo):
            client.auth_check(repo, write=True)
        elif problem := _creation_problem(identity, repo):
            raise AccessError(problem, "run `hf auth login` with a token that may write there")


def _creation_problem(identity: Mapping[str, Any], repo: str) -> str | None:
    """Why the owner of a token may not make a repository; None if nothing speaks against it."""
    namespace = repo.partition("/")[0]
    token = (identity.get("auth") or {}).get("accessToken") or {}
    if token.get("role") == "read":
        return "the token for the Hub may only read"
    roles = {org["name"]: org.get("roleInOrg") for org in identity.get("orgs") or ()}
    if namespace not in {identity.get("name"), *roles}:
        return f"the token is of {identity.get('name')}, who does not belong to {namespace}"
    if roles.get(namespace) == "read":
        return f"{identity.get('name')} may only read in {namespace}"
    if token.get("role") == "fineGrained" and not _may_write(token, namespace):
        return f"the token for the Hub may not make repositories in {namespace}"
    return None


def _may_write(token: Mapping[str, Any], namespace: str) -> bool:
    """Whether a fine-grained token has the permission for a user or an organisation."""
    scopes = (token.get("fineGrained") or {}).get("scoped") or ()
    return any(
        (scope.get("entity") or {}).get("name") == namespace
        and "repo.write" in (scope.get("permissions") or ())
        for scope in scopes
    )


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


def licence_gate(
    licence: str | None, repo: str, *, public: bool
) -> tuple[tuple[str, ...], dict[str, Path | str]]:
    """What a licence asks of whoever publishes a changed model.

    Returns:
        Sentences for the person who publishes, and files to add by name.

    Raises:
        AccessError: it forbids derivatives, is not known, or names are not as it wants.
    """
    known = (licence or "").lower()
    if _NO_DERIVATIVES.search(known):
        raise AccessError(f"the licence {licence} forbids publishing a changed model")
    if not known and public:
        raise AccessError(
            "the licence of the original model is not known, so the result stays private",
            "state it as `license:` in the front matter of the original's README.md",
        )
    if _LLAMA.search(known):
        return _llama_terms(known, repo)
    if known == "gemma":
        return ("NOTICE carries Gemma's terms on",), {"NOTICE": _GEMMA_NOTICE}
    return (), {}


def _llama_terms(licence: str, repo: str) -> tuple[tuple[str, ...], dict[str, Path | str]]:
    """Llama 3 and later: the name begins with Llama, a notice goes along (section 1.b)."""
    name = repo.partition("/")[2]
    if not name.startswith("Llama"):
        raise AccessError(
            f"the licence {licence} wants the name of a derived model to begin with 'Llama'",
            f"for example {repo.partition('/')[0]}/Llama-{name}",
        )
    version = licence.removeprefix("llama").lstrip("-")
    notice = (
        f"Built with Llama\n\nLlama {version} is licensed under the Llama {version} Community "
        "License, Copyright © Meta Platforms, Inc. All Rights Reserved.\n"
    )
    return ("NOTICE says 'Built with Llama'; add the agreement itself",), {"NOTICE": notice}


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
    snippets = load_snippets(name, artifact.format, hub=True)
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


class _State:
    """What is on the Hub already, by repository; a repeated command goes on from here."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.facts: dict[str, dict[str, str]] = read_json(path) if path.is_file() else {}

    def get(self, repo: str, key: str) -> str:
        return self.facts.get(repo, {}).get(key, "")

    def put(self, repo: str, key: str, value: str) -> None:
        self.facts.setdefault(repo, {})[key] = value
        atomic_write_json(self.path, self.facts)


def _client(api: HfApi | None) -> HfApi:
    from huggingface_hub import HfApi, constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise ResourceError("HF_HUB_OFFLINE is set: nothing can be published", "unset it")
    if api is None and get_token() is None:
        raise AccessError("there is no token for the Hub", "run `hf auth login`")
    return api or HfApi()


def _publish_one(
    api: HfApi, repository: Repository, state: _State, run: Path, *, pr: bool, public: bool
) -> None:
    """Create, upload, read back, and only then show it."""
    name = repository.name
    api.create_repo(name, private=True, exist_ok=True)
    api.auth_check(name, write=True)
    branch = _branch(api, name, state) if pr else "main"
    folder = run / "publish" / name.replace("/", "--")
    _stage(repository, folder)
    commit = api.upload_folder(
        repo_id=name,
        folder_path=folder,
        revision=branch,
        commit_message=f"{repository.artifact.format} by compressor",
    )
    revision = commit.oid or branch
    state.put(name, "revision", revision)
    _prove(api, name, revision, folder, repository.artifact.format)
    shutil.rmtree(folder, ignore_errors=True)
    if public and not pr:
        api.update_repo_settings(name, private=False)


def _branch(api: HfApi, name: str, state: _State) -> str:
    """The branch of the pull request, opened once and remembered."""
    if not state.get(name, "pull_request"):
        request = api.create_pull_request(name, title="Compressed model", repo_type="model")
        state.put(name, "pull_request", f"refs/pr/{request.num}")
    return state.get(name, "pull_request")


def _stage(repository: Repository, folder: Path) -> None:
    """The files of a repository in a folder of their own; big ones are linked."""
    shutil.rmtree(folder, ignore_errors=True)
    for path, item in repository.files.items():
        target = folder / path
        if isinstance(item, str):
            atomic_write_text(target, item)
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(item, target)
        except OSError:
            shutil.copy2(item, target)


def _prove(api: HfApi, name: str, revision: str, folder: Path, form: str) -> None:
    """Download what was uploaded, compare every byte, load it and write a few tokens."""
    with tempfile.TemporaryDirectory(prefix="compress-publish-") as work:
        found = Path(api.snapshot_download(name, revision=revision, local_dir=work))
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            there = found / path.relative_to(folder)
            if not there.is_file() or file_sha256(there) != file_sha256(path):
                raise VerificationError(
                    f"{name} at {revision}: {there.relative_to(found)} is not what was uploaded"
                )
        if form not in GRAPHS.values():  # its engine was asked about the same bytes
            reload.continued(found)


def _collect(api: HfApi, planned: Publication, state: _State, repo: str) -> str:
    """A collection of all repositories; the one of an earlier attempt is used again."""
    slug = state.get(repo, "collection")
    if not slug:
        namespace, title = repo.split("/")
        made = api.create_collection(
            title, namespace=namespace, private=not planned.public, exists_ok=True
        )
        slug = made.slug
        state.put(repo, "collection", slug)
    for repository in planned.repositories:
        api.add_collection_item(slug, repository.name, "model", exists_ok=True)
    return slug


@contextmanager
def _hub_errors(repo: str) -> Iterator[None]:
    """What the Hub's client raises, as one sentence each."""
    from huggingface_hub import errors

    # The client's transport was httpx and is httpx2; its base error is re-exported there.
    transport: type[Exception] = getattr(errors, "HTTPError", OSError)
    try:
        yield
    except errors.HfHubHTTPError as error:
        raise _http_error(repo, error.response.status_code) from None
    except errors.OfflineModeIsEnabled:
        raise ResourceError("HF_HUB_OFFLINE is set: nothing can be published") from None
    except (transport, ConnectionError, errors.LocalEntryNotFoundError) as error:
        raise ResourceError(f"the Hub cannot be reached ({type(error).__name__})", _AGAIN) from None


_AGAIN = "the same command goes on where it stopped"


def _http_error(repo: str, status: int) -> AccessError | ResourceError:
    if status in (401, 403):
        return AccessError(
            f"the Hub refused to write {repo} (HTTP {status})",
            "run `hf auth login` with a token that may write there",
        )
    if status == 404:
        return AccessError(
            f"{repo} does not exist on the Hub, or the token cannot see it",
            "check the organisation's name and the token's permissions",
        )
    if status == 409:
        return ResourceError(f"{repo} was changed by somebody else meanwhile (HTTP 409)", _AGAIN)
    if status == 429:
        return ResourceError("the Hub wants fewer requests (HTTP 429)", f"wait; then {_AGAIN}")
    return ResourceError(f"the Hub answered HTTP {status} for {repo}", _AGAIN)


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
