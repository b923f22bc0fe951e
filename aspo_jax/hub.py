"""Models of the Hugging Face hub by name: which commit, and which of its files.

A name is ``owner/name`` or ``owner/name@revision``; a revision is a branch, a tag or a commit. They
go where `huggingface_hub` keeps files (``HF_HOME``), and those alone that are read here.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from aspo_jax.data.tokenizer import FILES
from aspo_jax.errors import UserError, writing
from aspo_jax.model.hf import INDEX_FILE, WEIGHTS_FILE, weight_files
from aspo_jax.model.hf_config import CONFIG_FILE
from aspo_jax.model.hf_generation import GENERATION_FILE

SETTINGS = (CONFIG_FILE, GENERATION_FILE, INDEX_FILE, *FILES)
_NEEDED = f"{CONFIG_FILE}, tokenizer.json, tokenizer_config.json, {WEIGHTS_FILE}"
_NAME = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(\w[\w./-]*))?", re.ASCII)
_NO_OWNERS = ("models", "datasets", "spaces")  # pages of the hub; of folders good names
_LONGEST = 96  # characters of a name, the hub's limit
TIMEOUT_S = 10.0  # until the cache is asked instead


class HubError(UserError):
    """A model that the hub does not give, and that is not in the cache."""


class Name(NamedTuple):
    """A model on the hub: ``owner/name`` and a branch, a tag or a commit; the setting it is of."""

    repo: str
    revision: str
    setting: str = "Model.path"


class Fetched(NamedTuple):
    """A folder in the cache, and why the hub could not be asked about it; None: it was asked."""

    folder: Path
    doubt: str | None


def parse_name(text: str, setting: str = "Model.path") -> Name | None:
    """The name that a setting's text is; None where it cannot be one."""
    match = _NAME.fullmatch(text)
    if match is None or "--" in match[1] or ".." in text or len(match[1]) > _LONGEST:
        return None
    if match[1].partition("/")[0] in _NO_OWNERS or match[1].endswith((".git", "-", ".")):
        return None
    return Name(match[1], match[2] or "main", setting)


def fetch_settings(name: Name, revision: str) -> Fetched:
    """The folder of a revision with all but the weights in it; the folder is called as its commit.

    Raises:
        HubError: the hub has no such model or revision, or keeps it back, or it cannot be reached
            and the cache does not know the name.
        WriteError: the cache cannot be written.
    """
    # Asked first, for a download would try again and again for half a minute.
    doubt = _doubt(name._replace(revision=revision))
    with _silent():
        return Fetched(_snapshot(name, revision, SETTINGS, doubt), doubt)


def missing_weights(folder: Path) -> list[str]:
    """The files of weights that are not in a folder of `fetch_settings`."""
    has_index = (folder / INDEX_FILE).is_file() and not (folder / WEIGHTS_FILE).is_file()
    files = weight_files(folder) if has_index else [WEIGHTS_FILE]
    return [file for file in files if not (folder / file).is_file()]


def fetch_weights(name: Name, commit: str, folder: Path) -> None:
    """Bring the weights into a folder of `fetch_settings`.

    Raises:
        HubError, WriteError: as `fetch_settings`; the model has no safetensors.
    """
    missing, doubt = missing_weights(folder), _doubt(name._replace(revision=commit))
    if missing and doubt is None:
        _snapshot(name, commit, missing)
        missing = missing_weights(folder)
    if missing:
        raise _lacking(name, ", ".join(missing), doubt)


def _snapshot(name: Name, revision: str, files: Iterable[str], doubt: str | None = None) -> Path:
    """The folder of a revision with those of the files that it has.

    doubt: why the hub cannot be asked; None: it is asked.
    """
    from huggingface_hub import constants, snapshot_download

    with _explained(name, doubt), writing(constants.HF_HUB_CACHE):
        folder = snapshot_download(
            name.repo,
            revision=revision,
            allow_patterns=list(files),
            local_files_only=doubt is not None,
        )
    if not (Path(folder) / CONFIG_FILE).is_file():
        raise _lacking(name, CONFIG_FILE, doubt)
    return Path(folder)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """No bars for files that are there in a second."""
    from huggingface_hub import utils

    if utils.are_progress_bars_disabled():
        yield
        return
    utils.disable_progress_bars()
    try:
        yield
    finally:
        utils.enable_progress_bars()


# --- what the hub refuses -------------------------------------------------------------------------


def _doubt(name: Name) -> str | None:
    """Why the hub does not answer now; None: it does.

    Raises:
        HubError: it answers that there is no such model or revision, or not for everyone.
    """
    from huggingface_hub import HfApi

    try:
        with _explained(name):
            HfApi().model_info(name.repo, revision=name.revision, timeout=TIMEOUT_S)
    except Unreachable as error:
        return error.reason
    return None


class Unreachable(HubError):
    """The hub does not answer."""

    def __init__(self, name: Name, reason: str):
        super().__init__(f"{_found(name)}, {reason}, and the cache lacks it; {_by_hand(name)}")
        self.reason = reason


@contextlib.contextmanager
def _explained(name: Name, doubt: str | None = None) -> Iterator[None]:
    """Turn what `huggingface_hub` raises into a `HubError` that says what to do."""
    from huggingface_hub import errors as theirs

    errors: Any = theirs  # HTTPError, of the library that it rests on, is there but not exported
    page = f"https://huggingface.co/{name.repo}"
    log_in = "log in with `hf auth login` or set HF_TOKEN"
    use_cache = " (HF_HUB_OFFLINE=1 goes on with what the cache has)"
    try:
        yield
    except UserError:
        raise
    except errors.GatedRepoError as error:
        raise HubError(
            f"{_found(name)}, and the hub gives it only to those who accepted its conditions; "
            f"accept them at {page}, then {log_in}{use_cache}"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise HubError(
            f"{_found(name)}, and the hub has no model of that name, or a private one; check the "
            f"spelling, or {log_in}{use_cache}"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise HubError(
            f"{_found(name)}, and the model on the hub has no revision {name.revision!r}; expected "
            f"one of the branches, tags or commits at {page}/tree/main"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise Unreachable(name, doubt or _reason(error.__cause__ or error)) from error
    except (errors.HTTPError, OSError) as error:
        raise Unreachable(name, _reason(error)) from error


def _reason(error: BaseException) -> str:
    """Why the hub did not answer, in one line."""
    from huggingface_hub import errors

    if isinstance(error, errors.OfflineModeIsEnabled):
        return "the hub was not asked (HF_HUB_OFFLINE is set)"
    said = str(error).partition("\n")[0]
    return f"the hub cannot be reached ({type(error).__name__}: {said})"


def _lacking(name: Name, files: str, doubt: str | None) -> HubError:
    """Files that are neither in the cache nor, as far as is known, on the hub."""
    if doubt:
        return HubError(
            f"{_found(name)}, {doubt}, and the cache lacks its {files}; {_by_hand(name)}"
        )
    return HubError(
        f"{_found(name)}, and on the hub it has no {files}; expected the format of transformers "
        "with weights in safetensors (save those of other formats again with save_pretrained, and "
        f"set {name.setting} to that folder)"
    )


def _found(name: Name) -> str:
    revision = "" if name.revision == "main" else f"@{name.revision}"
    return f"{name.setting} = '{name.repo}{revision}': no folder of that name here"


def _by_hand(name: Name) -> str:
    """Which files to place where."""
    folder = f"models/{name.repo.partition('/')[2]}"
    revision = "" if name.revision == "main" else f" --revision {name.revision}"
    return (
        f"place {_NEEDED} (or shards and {INDEX_FILE}), and where the model has them "
        f"{GENERATION_FILE} and chat_template.jinja, in a folder {folder} (where there is a "
        f"network: `hf download {name.repo}{revision} --local-dir {folder}`) and set "
        f"{name.setting} = '{folder}'"
    )
