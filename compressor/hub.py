"""Writing to the Hub: who may, what its refusals mean, and what is there already."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.errors import AccessError, ResourceError
from compressor.formats.atomic import atomic_write_json
from compressor.formats.headers import read_json

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_AGAIN = "the same command goes on where it stopped"


def client(api: HfApi | None) -> HfApi:
    """The client given, or one with the token of `hf auth login`.

    Raises:
        AccessError: there is no token.
        ResourceError: the Hub must not be asked.
    """
    from huggingface_hub import HfApi, constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise ResourceError("HF_HUB_OFFLINE is set: nothing can be published", "unset it")
    if api is None and get_token() is None:
        raise AccessError("there is no token for the Hub", "run `hf auth login`")
    return api or HfApi()


def creation_problem(identity: Mapping[str, Any], repo: str) -> str | None:
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


@contextmanager
def hub_errors(repo: str) -> Iterator[None]:
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


class Uploads:
    """What is on the Hub already, by repository; a repeated command goes on from here."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.facts: dict[str, dict[str, str]] = read_json(path) if path.is_file() else {}

    def get(self, repo: str, key: str) -> str:
        """A fact; empty where it is not known."""
        return self.facts.get(repo, {}).get(key, "")

    def put(self, repo: str, key: str, value: str) -> None:
        """Note a fact, on disk before this returns."""
        self.facts.setdefault(repo, {})[key] = value
        atomic_write_json(self.path, self.facts)
