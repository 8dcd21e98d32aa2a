"""A reduced model onto the Hugging Face Hub: its files and a model card, in one commit."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evovit.checkpoints import hub
from evovit.checkpoints.card import renewed, write_card
from evovit.checkpoints.reduced import MANIFEST, load_reduced, read_manifest, save_reduced
from evovit.errors import EvoViTError, check_kind, shown
from evovit.model import ReducedViT
from evovit.runtime.files import as_path

CARD = "README.md"


def push_to_hub(
    model: ReducedViT | str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload a model of evovit",
    create_pr: bool = False,
    measured: Sequence[Any] = (),
    accuracy: Mapping[str, float] = {},
    base_model: str | None = None,
    host: str | None = None,
    host_options: Mapping[str, Any] = {},
) -> str:
    """Put a reduced model on the Hugging Face Hub, from where `load_reduced("hf:user/name")` loads it.

    The repository is created if it does not exist. In an existing model card, there or in the folder, the
    part that evovit wrote is rewritten, and what people wrote stays.

    Args:
        model: what `reduce_tokens` returns, or a folder that `save_reduced` wrote.
        repo_id: user/name, or a name of your own.
        private: whether a new repository is hidden from others; None: your organisation's default.
        token: None: as you are logged in.
        revision: branch to write to, created if it does not exist; None: the main branch.
        create_pr: propose the commit as a pull request instead.
        measured: rows of `evovit bench` for the card, or records of its rows.jsonl; dense ones are left out.
        accuracy: for the card: numbers by what was tested, such as "top-1 %, ImageNet validation".
        base_model: for the card: the Hub's name of the model it was made from.
        host, host_options: as of `save_reduced`.

    Returns:
        The address of the commit, or of the pull request.

    Raises:
        EvoViTError: a host that does not say how it is built, rows of another model, an invalid name, a Hub
        that cannot be reached or refuses.
    """
    repository = hub.checked(repo_id, revision, token)
    check_kind("commit_message", commit_message, str, "a text")
    check_kind("create_pr", create_pr, bool, "True or False")
    if not commit_message.strip():
        raise EvoViTError("commit_message is empty; say in a few words what the commit does.")
    if create_pr and revision is not None:
        raise EvoViTError("create_pr proposes a commit to the main branch; leave revision out.")
    told: dict[str, Any] = {"measured": measured, "accuracy": accuracy, "base_model": base_model}
    if base_model is not None:
        hub.checked(base_model, None, None)
    if isinstance(model, ReducedViT):
        with tempfile.TemporaryDirectory() as folder:
            save_reduced(model, folder, host=host, host_options=host_options)
            return _push(model, Path(folder), repository, private, commit_message, create_pr, told)
    if host is not None or host_options:
        raise EvoViTError("host is for a model object; a folder has its own, so leave host out.")
    place = as_path(model, "model")
    return _push(load_reduced(place), place, repository, private, commit_message, create_pr, told)


def _push(
    reduced: ReducedViT,
    folder: Path,
    repository: hub.Repository,
    private: bool | None,
    message: str,
    create_pr: bool,
    told: Mapping[str, Any],
) -> str:
    """Write the card, create the repository and commit."""
    manifest = read_manifest(folder / MANIFEST)
    if not manifest["build"] or not manifest["files"]:
        raise EvoViTError(
            f"This {shown(manifest.get('host'))} does not say how it is built, so it could not be loaded; "
            "give host=, its timm name, and host_options=, its arguments."
        )
    card = write_card(reduced, repository.name, manifest, **told)  # before anything is created
    there = hub.create(repository, private)
    card = card.replace(f'"{repository.name}"', f'"{there.name}"')  # with the user's name, where it had none
    files: dict[str, Path | bytes] = {name: folder / name for name in (MANIFEST, *manifest["files"])}
    place = there.fetch(CARD)
    written = [each for each in (place, folder / CARD) if each is not None and each.is_file()]
    old = written[0].read_text(encoding="utf-8", errors="replace") if written else None
    new = card if old is None else renewed(old, card)
    if place is None or new != old:
        files[CARD] = new.encode("utf-8")
    return there.commit(files, message, create_pr)
