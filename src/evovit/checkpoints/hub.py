"""The Hugging Face Hub: a file of a repository into the Hub's cache, files into a repository as one commit.

`huggingface_hub` does the work, with its own cache, login and settings (HF_HOME, HF_ENDPOINT and others).
Whatever goes wrong is one sentence.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from evovit.errors import EvoViTError, check_kind, in_one_line, shown

PREFIX = "hf:"  # begins the name of a model on the Hub
LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"


class Repository(NamedTuple):
    """A repository of a model on the Hub, at a revision."""

    id: str  # user/name
    revision: str | None  # branch, tag or commit; None: the main branch
    token: str | bool | None  # None: as the user logged in

    @property
    def name(self) -> str:
        """The repository as `load_reduced` takes it."""
        return f"{PREFIX}{self.id}" + (f"@{self.revision}" if self.revision else "")

    def fetch(self, file: str) -> Path | None:
        """Return a file in the Hub's cache, fetched where it is new; None where there is none.

        The folder it lies in is named by its commit, and holds what else was fetched of that.
        """
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        with told_of(self):
            try:
                return Path(
                    hf_hub_download(
                        self.id, file, revision=self.revision, token=self.token, **_introduction()
                    )
                )
            except LocalEntryNotFoundError:  # the Hub was not reached
                raise
            except EntryNotFoundError:
                return None

    def at_commit_of(self, file: Path) -> Repository:
        """Return the repository at the commit that a fetched file is of."""
        return self._replace(revision=file.parent.name)

    def commit(self, files: Mapping[str, Path | bytes], message: str, create_pr: bool) -> str:
        """Write files into the repository, all or none; return the address of the commit, or pull request."""
        from huggingface_hub import CommitOperationAdd

        added = [CommitOperationAdd(name, content) for name, content in files.items()]
        with told_of(self):
            done = _api(self.token).create_commit(
                self.id, added, commit_message=message, revision=self.revision, create_pr=create_pr
            )
            return str(done.pr_url if create_pr else done.commit_url)


def find(name: str, revision: str | None = None, token: str | bool | None = None) -> Repository:
    """Return the repository of a name: `hf:user/name`, or with its revision `hf:user/name@revision`."""
    text, _, inside = name.removeprefix(PREFIX).partition("@")
    if inside and revision is not None:
        raise EvoViTError(
            f"{shown(name)} has a revision, and revision is {shown(revision)}; give one of them."
        )
    return checked(text, inside or revision, token)


def checked(name: Any, revision: Any, token: Any) -> Repository:
    """Return the repository of a name without `hf:`; raises `EvoViTError` for what cannot be one."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    check_kind("The name of the repository", name, str, "user/name")
    try:
        if not name.isascii():
            raise HFValidationError("it has other letters than A to Z")
        validate_repo_id(name)
    except HFValidationError as error:
        raise EvoViTError(
            f"{shown(name)} is not the name of a Hub repository ({in_one_line(error)}); give user/name."
        ) from error
    if revision is not None and not (isinstance(revision, str) and _is_word(revision)):
        raise EvoViTError(f"revision is {shown(revision)}; give a branch, a tag or a commit, or None.")
    if not (token is None or isinstance(token, bool) or (isinstance(token, str) and _is_word(token))):
        raise EvoViTError(f"token is not text without blanks; {LOG_IN}, and leave it out.")  # it is not shown
    return Repository(name, revision, token)


def create(repository: Repository, private: bool | None) -> Repository:
    """Create a repository, or its branch, where it is not there; return it with its user's name."""
    if private is not None:
        check_kind("private", private, bool, "True, False or None")
    with told_of(repository):
        api = _api(repository.token)
        found = repository._replace(id=api.create_repo(repository.id, private=private, exist_ok=True).repo_id)
        if private and not api.model_info(found.id).private:
            raise EvoViTError(
                f"{found.name} exists and is public; make it private on the Hub, or give another name."
            )
        if found.revision and not found.revision.startswith("refs/"):
            api.create_branch(found.id, branch=found.revision, exist_ok=True)
    return found


@contextmanager
def told_of(repository: Repository) -> Iterator[None]:
    """Turn what goes wrong between here and the Hub into one sentence, an `EvoViTError`."""
    from huggingface_hub import errors

    name, bare = repository.name, PREFIX + repository.id
    try:
        yield
    except EvoViTError:
        raise
    except errors.GatedRepoError as error:
        raise EvoViTError(f"{name} is gated: request access on its page, then {LOG_IN}.") from error
    except errors.RepositoryNotFoundError as error:
        raise EvoViTError(
            f"The Hub has no model {bare} that you may see; check the name, or, if it is private, {LOG_IN}."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise EvoViTError(
            f"{bare} has no revision {shown(repository.revision)}; give a branch, a tag or a commit of it."
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise EvoViTError(
            f"The Hub cannot be reached ({_cause(error)}), and {name} is not in its cache; check the network "
            "and try again."
        ) from error
    except (errors.LocalTokenNotFoundError, errors.HfHubHTTPError) as error:
        code = getattr(getattr(error, "response", None), "status_code", 401)
        if code == 401:
            raise EvoViTError(f"{name}: the Hub does not know who you are; {LOG_IN}.") from error
        why = (getattr(error, "server_message", None) or in_one_line(error)).rstrip(".")
        may = f"; {LOG_IN}, with a token that may write there" if code == 403 else ""
        raise EvoViTError(f"The Hub refuses the request for {name} (status {code}: {why}){may}.") from error
    except Exception as error:  # the client, its network library and a full disk raise what they like
        raise EvoViTError(f"{name}: {_cause(error)}; check network and disk and try again.") from error


def _cause(error: BaseException) -> str:
    """Return what an error of the client says, or the one that caused it."""
    cause = error.__cause__ or error
    return f"{type(cause).__name__}: {in_one_line(cause)}"


def _is_word(text: str) -> bool:
    return text.isascii() and text.isprintable() and text != "" and " " not in text


def _introduction() -> dict[str, str]:
    return {"library_name": "evovit", "library_version": version("evovit")}


def _api(token: str | bool | None) -> Any:
    from huggingface_hub import HfApi

    return HfApi(token=token, **_introduction())
