"""Files of a data set on the Hugging Face hub, put there in one commit, and fetched: how ledgers are shared."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path

from fra.checkpoints.hub import reaching
from fra.checkpoints.weights import first_line
from fra.errors import CannotLoad, FraError

_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


def check_name(name: str) -> None:
    """Raises FraError for what is no OWNER/NAME."""
    if not _NAME.fullmatch(name):
        raise FraError(f"{name[:200]!r} is no data set of the hub: say OWNER/NAME.")


def put(name: str, files: Mapping[str, bytes], card: str, message: str, *, private: bool = False) -> str:
    """Commits files, by their paths there, to the data set, which is made where there is none, with `card` as its
    README; a README that is there stays. Returns the address of the commit.

    Raises FraError where the hub refuses, CannotLoad where it is not reached.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError

    check_name(name)
    api = HfApi()
    try:
        api.create_repo(name, repo_type="dataset", private=private, exist_ok=True)
        new = dict(files)
        if not api.file_exists(name, "README.md", repo_type="dataset"):
            new["README.md"] = card.encode()
        operations = [CommitOperationAdd(path, content) for path, content in new.items()]
        done = api.create_commit(name, operations, commit_message=message, repo_type="dataset")
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        hint = "log in (hf auth login) with a token that may write there" if status in (401, 403) else "try again"
        raise FraError(f"the hub did not take the data set {name!r} ({first_line(error)}): {hint}.") from error
    except (OSError, RuntimeError) as error:
        raise _away(name, error) from error
    except Exception as error:
        # Errors of the hub's HTTP client, whichever it has: no dependency of this library by name.
        if not type(error).__module__.startswith(("httpx", "httpcore", "requests")):
            raise
        raise _away(name, error) from error
    return str(done.commit_url)


def _away(name: str, error: Exception) -> CannotLoad:
    return CannotLoad(
        f"the Hugging Face hub is not reached, and the data set {name!r} is not written ({first_line(error)}): connect."
    )


def fetch(name: str, pattern: str, revision: str | None = None) -> list[Path]:
    """The files of a data set whose paths there fit a pattern, downloaded or cached, by path. Raises FraError where it
    does not exist or has none, CannotLoad where the hub is not reached.
    """
    from huggingface_hub import snapshot_download

    check_name(name)
    with reaching(f"the data set {name!r}"):
        folder = Path(snapshot_download(name, repo_type="dataset", revision=revision, allow_patterns=[pattern]))
    found = sorted(
        path for path in folder.rglob("*") if path.is_file() and fnmatch(path.relative_to(folder).as_posix(), pattern)
    )
    if not found:
        raise FraError(f"the data set {name!r} has no {pattern}: it is none that `fra push` made.")
    return found


def yaml_front(values: Mapping[str, object]) -> str:
    """Front matter of a card: JSON is YAML."""
    return f"---\n{json.dumps(values, indent=1)}\n---\n"
