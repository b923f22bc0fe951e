"""Data sets of the Hugging Face hub by name, through its client's cache.

    hub:openai/gsm8k/main/train             owner, name, subset, split
    hub:HuggingFaceH4/MATH-500/test         without subsets
    hub:openai/gsm8k@REVISION/main/train    a branch, a tag or a commit
    hub:OWNER/NAME/folder/file.jsonl        a file, or a pattern, by its path there

Only the files of the split are downloaded. Without a connection those of the cache are read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from aspo_jax.data.rows import DataError
from aspo_jax.errors import writing
from aspo_jax.paths import shorten

PREFIX = "hub:"

_NAME = re.compile(
    r"hub:(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>refs/\w+/[\w.-]+|[\w.-]+))?(/(?P<split>.+))?"
)
_CONVERTED = "refs/convert/parquet"  # where the hub keeps what it made of other formats
_TIMEOUT_S = 10.0  # until the cache is read instead
_SHARD = re.compile(r"(-\d+-of-\d+(-\w+)?|/\d+)$")  # what a file's name adds to its split


class _DataSet(NamedTuple):
    """What is wanted: the files of ``split``, with its subset, if any, before it."""

    repo: str
    revision: str | None
    split: str

    @property
    def revisions(self) -> list[str | None]:
        """Where to look, one after the other; None is the main branch."""
        return [self.revision] if self.revision else [None, _CONVERTED]


def download(text: str, ends: Sequence[str]) -> list[tuple[Path, str]]:
    """The files of a data set's split in the cache, and their names on the hub.

    ends: of the names of files that can be read, the best first.

    Raises:
        DataError: no such name, repository, revision or split; not allowed; not to be had.
    """
    wanted = _parse(text)
    listed = _Listing(wanted, ends)
    for revision in wanted.revisions:
        if chosen := listed.choose(revision):
            folder = listed.fetch(revision, chosen)
            at = f"@{wanted.revision}" if wanted.revision else ""
            return [(folder / name, f"{PREFIX}{wanted.repo}{at}/{name}") for name in chosen]
    raise listed.no_split()


def _parse(text: str) -> _DataSet:
    match = _NAME.fullmatch(text)
    if match is None:
        raise DataError(
            f"{shorten(text)!r}: found no name of a data set, expected such as "
            "'hub:openai/gsm8k/main/train': owner, name, subset if there are any, and split; "
            "correct it"
        )
    return _DataSet(match["repo"], match["revision"], (match["split"] or "").rstrip("/"))


def choose(names: Iterable[str], split: str, ends: Sequence[str]) -> list[str]:
    """The files that hold a split, by the ways in which the hub names them; of several formats the
    first that there is.

    'main/train' is main/train-00000-of-00002.parquet and so on, main/train/0000.parquet,
    main/train.jsonl, or one of those in data/. A split may be a file's name, or a pattern of some.
    """
    stems = _stems(names, ends)
    if any(fnmatchcase(name, split) for name in stems):
        return sorted(name for name in stems if fnmatchcase(name, split))
    found = [name for name, stem in stems.items() if split_of(stem) == split_of(split)]
    for end in ends:
        if same := sorted(name for name in found if format_end(name) == end):
            return same
    return []


def split_of(stem: str) -> str:
    """The subset and split of a file's name without its end."""
    return _SHARD.sub("", stem).removeprefix("data/").removeprefix("default/")


def _stems(names: Iterable[str], ends: Sequence[str]) -> dict[str, str]:
    """The names of data files, and those without their ends."""
    return {
        name: name.removesuffix(".gz").removesuffix(format_end(name))
        for name in names
        if format_end(name) in ends
    }


def format_end(name: str) -> str:
    """The end of a name that says the format: '.jsonl' of 'a.jsonl.gz'."""
    return Path(name.removesuffix(".gz")).suffix


def _network_errors() -> tuple[type[Exception], ...]:
    """What the hub's client raises where there is no connection or no answer."""
    from huggingface_hub import errors

    return errors.HTTPError, OSError  # pyright: ignore[reportPrivateImportUsage]


class _Listing:
    """The files of a data set, on the hub or, where that cannot be reached, in the cache.

    why_offline: why the hub was not reached; None: it was, or was not asked yet.
    """

    def __init__(self, wanted: _DataSet, ends: Sequence[str]):
        self.wanted = wanted
        self.ends = ends
        self.why_offline: Exception | None = None
        self._names: list[str] = []

    def choose(self, revision: str | None) -> list[str]:
        """The files of the split in a revision."""
        names = self._list(revision)
        self._names += names
        return choose(names, self.wanted.split, self.ends)

    def _list(self, revision: str | None) -> list[str]:
        from huggingface_hub import HfApi, errors

        try:
            if self.why_offline is None:
                api, repo = HfApi(), self.wanted.repo
                found = api.dataset_info(repo, revision=revision, timeout=_TIMEOUT_S)
                return [file.rfilename for file in found.siblings or ()]
        except errors.RevisionNotFoundError as error:
            if revision == _CONVERTED:
                return []
            raise self._refusal(error) from error
        except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
            raise self._refusal(error) from error
        except _network_errors() as error:
            self.why_offline = error
        return self._cached(revision)

    def _cached(self, revision: str | None) -> list[str]:
        """What a revision held when some of it was downloaded."""
        from huggingface_hub import errors, get_cached_repo_tree

        try:
            repo = self.wanted.repo
            return [
                f.path for f in get_cached_repo_tree(repo, repo_type="dataset", revision=revision)
            ]
        except errors.CachedRepoTreeNotFoundError:
            return []

    def fetch(self, revision: str | None, names: list[str]) -> Path:
        """The folder of the cache in which the files of a revision are, all of them."""
        from huggingface_hub import constants, errors, snapshot_download

        try:
            with writing(constants.HF_HUB_CACHE):
                folder = snapshot_download(
                    self.wanted.repo,
                    repo_type="dataset",
                    revision=revision,
                    allow_patterns=names,
                    local_files_only=self.why_offline is not None,
                )
        except errors.RepositoryNotFoundError as error:
            raise self._refusal(error) from error
        except (*_network_errors(), errors.EntryNotFoundError) as error:
            self.why_offline = self.why_offline or error
            raise self._unreachable(names) from error
        return Path(folder)

    def _refusal(self, error: Exception) -> DataError:
        """What the hub answers to everyone, or to whoever has not agreed or logged in."""
        from huggingface_hub import errors

        page = f"https://huggingface.co/datasets/{self.wanted.repo}"
        log_in = "log in with `hf auth login` or set HF_TOKEN"
        if isinstance(error, errors.GatedRepoError):
            remedy = f"agree on {page}, then {log_in}"
            return self._error("a data set that asks for an agreement", remedy)
        if isinstance(error, errors.RevisionNotFoundError):
            remedy = f"expected one of the branches, tags or commits at {page}/tree/main"
            return self._error(f"no revision {self.wanted.revision!r}", remedy)
        remedy = f"check the name, or if {page} is yours, {log_in}"
        return self._error("no such data set, or a private one", remedy)

    def no_split(self) -> DataError:
        """What is wrong where no file was chosen."""
        if self.why_offline is not None:
            return self._unreachable([])
        splits = sorted(set(map(split_of, _stems(self._names, self.ends).values())))
        shown = ", ".join(splits[:20]) + (f" and {len(splits) - 20} more" if splits[20:] else "")
        return self._error(
            f"no split {shorten(self.wanted.split)!r}" if self.wanted.split else "no split",
            f"expected one of {shown}, or the path of a file there"
            if splits
            else f"expected files that end in {', '.join(self.ends)}; take another data set",
        )

    def _unreachable(self, names: list[str]) -> DataError:
        reason = str(self.why_offline).partition("\n")[0]
        files = f" {' '.join(names)}" if 0 < len(names) <= 8 else ""
        at = f" --revision {self.wanted.revision}" if self.wanted.revision else ""
        repo, folder = self.wanted.repo, f"data/{self.wanted.repo.partition('/')[2]}"
        return self._error(
            f"no way to the hub ({type(self.why_offline).__name__}: {shorten(reason, 160)}), nor "
            "all of its files in the cache",
            f"where there is a network: hf download --repo-type dataset {repo}{files}{at} "
            f"--local-dir {folder}; bring that folder here, and give the path of its files in "
            "place of the name",
        )

    def _error(self, found: str, remedy: str) -> DataError:
        at = f"@{self.wanted.revision}" if self.wanted.revision else ""
        name = f"{PREFIX}{self.wanted.repo}{at}/{self.wanted.split}".rstrip("/")
        return DataError(f"{name}: found {found}; {remedy}")
