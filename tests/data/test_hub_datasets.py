"""Data sets by name: from a hub on loopback, from the cache without one, and every refusal."""

import hashlib
import json
import urllib.parse
from pathlib import Path

import huggingface_hub.constants as theirs
import pytest
from data_files import encoded
from hub_toy import serving

from aspo_jax.data import DataError, Fields, read_rows
from aspo_jax.data.formats import READERS
from aspo_jax.data.hub import choose

MATH = Fields(grader="math")
NOBODY = "http://127.0.0.1:9"  # where no hub answers
CONVERTED = "refs/convert/parquet"


def rows(*answers):
    return [{"prompt": "a", "answer": str(answer)} for answer in answers]


class Hub:
    """Data sets: (repository, branch) -> file -> content."""

    def __init__(self):
        self.sets = {
            ("openai/gsm8k", "main"): {
                "README.md": b"read me",
                "main/train-00000-of-00002.parquet": encoded(rows(1, 2), "parquet"),
                "main/train-00001-of-00002.parquet": encoded(rows(3), "parquet"),
                "main/test-00000-of-00001.parquet": encoded(rows(4), "parquet"),
                "socratic/train-00000-of-00001.parquet": encoded(rows(5), "parquet"),
            },
            ("openai/gsm8k", "v2"): {"data/train.jsonl": encoded(rows(6), "jsonl")},
            ("lab/scripted", "main"): {"scripted.py": b"...", "raw/all.zip": b"PK"},
            ("lab/scripted", CONVERTED): {
                "default/train/0000.parquet": encoded(rows(7), "parquet"),
                "default/train/0001.parquet": encoded(rows(8), "parquet"),
                "default/test/0000.parquet": encoded(rows(9), "parquet"),
            },
            ("lab/plain", "main"): {"scaler.json": encoded(rows(10), "json"), "a.csv.gz": b""},
            ("lab/agreed", "main"): {"train.jsonl": b""},
            ("lab/text", "main"): {"README.md": b"", "train.txt": b""},
        }
        self.refused = {"lab/gated": 403, "lab/down": 503}
        self.given = []  # paths
        self.url = ""

    @property
    def fetched(self):
        """The names of the files that were fetched."""
        return [path.split("/", 6)[6] for path in self.given if "/resolve/" in path]

    def answer(self, path):
        """Status, headers and body."""
        parts = path.strip("/").split("/")
        api = parts[:2] == ["api", "datasets"]
        repo = "/".join(parts[2:4] if api else parts[1:3])
        if repo in self.refused:
            gated = {"X-Error-Code": "GatedRepo"} if self.refused[repo] == 403 else {}
            return self.refused[repo], gated, b"{}"
        if all(repo != known for known, _ in self.sets):
            return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
        revision = urllib.parse.unquote(
            parts[5] if api and parts[5:] else "main" if api else parts[4]
        )
        branches = {branch: self.commit(repo, branch) for r, branch in self.sets if r == repo}
        commit = branches.get(revision, revision)
        branch = next((b for b, c in branches.items() if c == commit), None)
        if branch is None:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
        files = self.sets[repo, branch]
        if not api and repo == "lab/agreed":
            return 403, {"X-Error-Code": "GatedRepo"}, b""
        if not api:
            name = urllib.parse.unquote("/".join(parts[5:]))
            tag = hashlib.sha1(files[name]).hexdigest()
            return 200, {"X-Repo-Commit": commit, "ETag": f'"{tag}"'}, files[name]
        listed = [{"type": "file", "path": n, "size": len(b), "oid": "0"} for n, b in files.items()]
        info = {"id": repo, "sha": commit, "siblings": [{"rfilename": n} for n in files]}
        return 200, {}, json.dumps(listed if "tree" in parts[4:5] else info).encode()

    @staticmethod
    def commit(repo, branch):
        return hashlib.sha1(f"{repo} {branch}".encode()).hexdigest()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub that the client asks, and an empty cache."""
    monkeypatch.setattr(theirs, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(theirs, "HF_HUB_OFFLINE", False)
    with serving(Hub()) as made:
        point(monkeypatch, made.url)
        yield made


def point(monkeypatch, url):
    monkeypatch.setattr(theirs, "ENDPOINT", url)
    template = "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(theirs, "HUGGINGFACE_CO_URL_TEMPLATE", url + template)


def answers(name):
    return [row["answer"] for row in read_rows(name, fields=MATH)]


NAMES = {
    "hub:openai/gsm8k/main/train": ["1", "2", "3"],
    "hub:openai/gsm8k/main/test/": ["4"],
    "hub:openai/gsm8k/socratic/train": ["5"],
    "hub:openai/gsm8k@v2/train": ["6"],
    f"hub:openai/gsm8k@{Hub.commit('openai/gsm8k', 'v2')}/train": ["6"],
    "hub:openai/gsm8k/main/train-00001-of-00002.parquet": ["3"],
    "hub:openai/gsm8k/*/train-*.parquet": ["1", "2", "3", "5"],
    "hub:lab/scripted/train": ["7", "8"],
    "hub:lab/scripted/default/test": ["9"],
    f"hub:lab/scripted@{CONVERTED}/test": ["9"],
    "hub:lab/plain/scaler": ["10"],
    "hub:lab/plain/scaler.json": ["10"],
}


@pytest.mark.parametrize("name", NAMES)
def test_a_split_is_downloaded_alone_and_read_again_without_a_connection(hub, monkeypatch, name):
    assert answers(name) == NAMES[name]
    assert len(hub.fetched) == len(set(hub.fetched)) <= 4
    assert all(name.endswith((".parquet", ".jsonl", ".json")) for name in hub.fetched)
    count = len(hub.fetched)
    monkeypatch.setattr(theirs, "HF_HUB_OFFLINE", True)
    assert answers(name) == NAMES[name]
    monkeypatch.setattr(theirs, "HF_HUB_OFFLINE", False)
    point(monkeypatch, NOBODY)
    assert answers(name) == NAMES[name]
    assert len(hub.fetched) == count


def test_only_the_files_of_the_split_are_downloaded(hub):
    answers("hub:openai/gsm8k/main/train")
    assert sorted(hub.fetched) == [f"main/train-0000{i}-of-00002.parquet" for i in range(2)]


def test_a_row_is_named_by_its_place_on_the_hub(hub):
    places = [row["where"] for row in read_rows("hub:openai/gsm8k/main/train", fields=MATH)]
    shard = "hub:openai/gsm8k/main/train-0000{}-of-00002.parquet:row {}"
    assert places == [shard.format(0, 1), shard.format(0, 2), shard.format(1, 1)]
    (row,) = read_rows("hub:openai/gsm8k@v2/train", fields=MATH)
    assert row["where"] == "hub:openai/gsm8k@v2/data/train.jsonl:1"


def test_a_new_commit_is_read(hub):
    assert answers("hub:openai/gsm8k@v2/train") == ["6"]
    hub.sets["openai/gsm8k", "v2"] = {"data/train.jsonl": encoded(rows(66), "jsonl")}
    hub.commit = lambda _, branch: hashlib.sha1(f"new {branch}".encode()).hexdigest()
    assert answers("hub:openai/gsm8k@v2/train") == ["66"]


REFUSED = {
    "hub:openai/gsm8k/train": (
        "found no split 'train'; expected one of main/test, main/train, socratic/train, or the path"
    ),
    "hub:openai/gsm8k": "found no split; expected one of main/test",
    "hub:openai/gsm8k/main/*.csv": "found no split 'main/..csv'; expected one of main/test",
    "hub:openai/gsm8k@v3/train": "found no revision 'v3'; expected one of the branches.*/tree/main",
    "hub:openai/gsm9k/main/train": "found no such data set, or .*check the name, or .*log",
    "hub:lab/gated/train": "asks for an agreement; agree on https.*lab/gated.*hf auth login",
    "hub:lab/agreed/train": "asks for an agreement; agree on https.*lab/agreed",
    "hub:lab/down/train": "found no way to the hub .*503.*hf download --repo-type dataset lab/down",
    "hub:lab/text/train": "found no split 'train'; expected files that end in .jsonl, ",
    "hub:lab/scripted/dev": "found no split 'dev'; expected one of test, train",
    "hub:gsm8k": "found no name of a data set, expected such as 'hub:openai/gsm8k/main/train'",
    "hub:": "found no name of a data set",
    "hub:a b/c/train": "found no name of a data set",
    "hub:a--b/c/train": "found no such data set",
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_says_what_to_do(hub, name):
    with pytest.raises(DataError, match=REFUSED[name]) as error:
        answers(name)
    assert str(error.value).strip("'").startswith(name)


@pytest.mark.parametrize("is_offline", [True, False])
def test_without_hub_and_cache_it_says_which_files_to_place_where(hub, monkeypatch, is_offline):
    point(monkeypatch, NOBODY)
    monkeypatch.setattr(theirs, "HF_HUB_OFFLINE", is_offline)
    with pytest.raises(
        DataError, match="no way to the hub .*nor all of its files in the cache"
    ) as e:
        answers("hub:openai/gsm8k@v2/train")
    command = "hf download --repo-type dataset openai/gsm8k --revision v2 --local-dir data/gsm8k"
    assert command in str(e.value)


def test_a_cache_that_is_not_whole_is_not_read(hub, monkeypatch):
    """Half of a split would be another data set."""
    name = "hub:openai/gsm8k/main/train"
    read_rows(name, fields=MATH)
    (shard,) = Path(theirs.HF_HUB_CACHE).rglob("train-00001-of-00002.parquet")
    shard.unlink()
    point(monkeypatch, NOBODY)
    with pytest.raises(DataError, match="no way to the hub .*gsm8k main/train-00000-of-00002.parq"):
        answers(name)


def test_a_download_that_breaks_off_is_no_data_set(hub):
    listed = hub.answer
    gone = (404, {"X-Error-Code": "EntryNotFound"}, b"")
    hub.answer = lambda path: gone if "/resolve/" in path else listed(path)
    with pytest.raises(DataError, match="no way to the hub .*default/train/0000.parquet"):
        answers("hub:lab/scripted/train")


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("train", ["train-00000-of-00001-a1b2c3.parquet"]),
        ("train_sft", ["data/train_sft-00000-of-00001.parquet"]),
        ("all/train", ["all/train/0000.parquet", "all/train/0001.parquet"]),
        ("test", ["test.jsonl.gz"]),
        ("dev", ["data/dev.csv"]),
        ("half", ["half.json"]),
        ("t", []),
        ("", []),
    ],
)
def test_how_the_hub_names_files(split, expected):
    names = [
        "train-00000-of-00001-a1b2c3.parquet",
        "data/train_sft-00000-of-00001.parquet",
        "all/train/0001.parquet",
        "all/train/0000.parquet",
        "test.jsonl.gz",
        "test.md",
        "data/dev.csv",
        "half.csv",
        "half.parquet",
        "half.json",
    ]
    assert choose(names, split, tuple(READERS)) == expected
