"""Models by name: from a hub on loopback, from the cache, by hand; and which commit a run keeps."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import huggingface_hub.constants as theirs
import numpy as np
import pytest
from hub_toy import serving
from toy import TINY_CONFIG, bits, random_params, toy_mesh, toy_model

from aspo_jax import check, export, runtime, train
from aspo_jax.build import check_inputs
from aspo_jax.config import Config, ConfigError, read_config
from aspo_jax.data import CHARACTERS, DataError, build_character_tokenizer
from aspo_jax.errors import WriteError
from aspo_jax.hub import HubError, parse_name
from aspo_jax.library import load
from aspo_jax.model import load_params, save_model
from aspo_jax.origin import fetch_weights, locate, locate_teacher
from aspo_jax.parts import FACTORIES
from aspo_jax.planning.programs import read_shape
from aspo_jax.policy import load_policy
from aspo_jax.run.records import claim_folder

REPO = "acme/tiny-2.5"
SETTINGS = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
SETTINGS = sorted([*SETTINGS, "chat_template.jinja"])
OTHERS: dict[str, bytes] = {  # __ is a slash, _DOT_ a dot
    "README_DOT_md": b"read me",
    "pytorch_model_DOT_bin": b"pickle",
    "consolidated_DOT_safetensors": b"another format",
    "tiny_DOT_gguf": b"another one",
    "original__consolidated_DOT_00_DOT_pth": b"and another",
    "onnx__model_DOT_onnx": b"onnx",
    "training_args_DOT_json": b"{}",
}


def save_tiny(folder: Path, seed: int = 0, max_shard_bytes: int = 10**9) -> Path:
    """A model of the embedded task's vocabulary, as a folder, with two ids that end a response."""
    tokenizer = build_character_tokenizer(CHARACTERS)
    model = toy_model(vocab_size=len(tokenizer))
    save_model(
        folder,
        random_params(model, seed),
        model.config,
        tokenizer.save_pretrained,
        eos_token_id=(2, 17),
        max_shard_bytes=max_shard_bytes,
    )
    return folder


@pytest.fixture
def tiny(tmp_path) -> Path:
    return save_tiny(tmp_path / "made" / "tiny")


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache, and a place without folders of models."""
    monkeypatch.setattr(theirs, "HF_HUB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "cache"


@pytest.fixture
def loopback(cache, monkeypatch):
    with serving() as own:
        use(own.url, monkeypatch)
        yield own


def use(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(theirs, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(theirs, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(theirs, "HUGGINGFACE_CO_URL_TEMPLATE", template)


def config_of(path: str, *extra: str) -> Config:
    settings = (*TINY_CONFIG.strip().splitlines(), f"Model.path = {path!r}", *extra)
    flags = [word for setting in settings for word in ("--set", setting.replace(" = ", "="))]
    return read_config(["--config", "countdown_quick", *flags], FACTORIES)


def folder_of(config: Config) -> Path:
    assert config.model_folder is not None
    return Path(config.model_folder)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Qwen/Qwen2.5-1.5B-Instruct", ("Qwen/Qwen2.5-1.5B-Instruct", "main")),
        ("a/b_c.d@v1.0", ("a/b_c.d", "v1.0")),
        ("a/b@refs/pr/3", ("a/b", "refs/pr/3")),
        ("models/Qwen2.5-0.5B", None),  # a page of the hub: nobody's name there
        *((text, None) for text in ("gpt2", "a/b/c", "/a/b", "./a", "~/a", "../a/b", "a/b/")),
        *((text, None) for text in ("a b/c", "a/b--c", "a/b..c", "a/b@x y", "a/b@", "a/b.git")),
        *((text, None) for text in ("é/b", "https://huggingface.co/a/b", "a/b@../x", "")),
        ("a/" + "b" * 99, None),
    ],
)
def test_what_can_be_a_name(text, expected):
    assert parse_name(text) == (expected and (*expected, "Model.path"))


# --- from the hub ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shard", [10**9, 3000], ids=["one file", "shards"])
def test_only_what_is_read_is_fetched_and_weights_come_last(tmp_path, loopback, shard):
    source = save_tiny(tmp_path / "source", max_shard_bytes=shard)
    weights = sorted(path.name for path in source.glob("*.safetensors"))
    index = [path.name for path in source.glob("*.index.json")]
    assert (len(weights) > 1) == bool(index) == (shard == 3000)
    commit = loopback.push(REPO, source, **OTHERS)
    config = locate(config_of(REPO))
    assert config.origin and config.origin.commit == commit
    assert loopback.fetched() == sorted([*SETTINGS, *index])
    assert dict(check_inputs(config))["policy"] == f"{REPO}, commit {commit[:12]}"
    fetch_weights(config)
    assert loopback.fetched() == weights
    for path in source.iterdir():
        assert (folder_of(config) / path.name).read_bytes() == path.read_bytes()
    fetch_weights(config)
    assert locate(config) is config
    assert locate(config_of(REPO)) == config and loopback.fetched() == []


def test_a_plan_fetches_no_weights(tiny, loopback):
    commit = loopback.push(REPO, tiny)
    shape, source = read_shape(config_of(REPO))
    assert shape.hidden_size == 16 and source == f"{REPO}, commit {commit[:12]} of the hub"
    assert loopback.fetched() == SETTINGS


def test_branches_tags_and_commits(tmp_path, loopback):
    commits = {
        branch: loopback.push(REPO, save_tiny(tmp_path / branch, seed), branch)
        for seed, branch in enumerate(("main", "v1.0", "refs/pr/3"))
    }
    assert len(set(commits.values())) == 3
    for branch, commit in commits.items():
        for revision in (branch, commit):
            config = locate(config_of(f"{REPO}@{revision}"))
            assert folder_of(config).name == commit
    old = commits["main"]
    new = loopback.push(REPO, save_tiny(tmp_path / "newer", seed=7))
    assert folder_of(locate(config_of(REPO))).name == new != old
    assert folder_of(locate(config_of(f"{REPO}@{old}"))).name == old


def test_a_folder_of_that_name_wins(tiny, loopback):
    loopback.push(REPO, tiny)
    shutil.copytree(tiny, REPO)
    config = locate(config_of(REPO))
    assert config.model_folder == REPO and config.origin == (REPO, None)
    fetch_weights(config)
    assert loopback.given == []


def test_every_id_that_ends_a_response_is_the_named_models(tiny, loopback):
    loopback.push(REPO, tiny)
    config = locate(config_of(REPO))
    assert load_policy(config, config.model_folder, toy_mesh()).stop_ids == (2, 17)


def test_the_library_loads_a_name(tiny, loopback):
    loopback.push(REPO, tiny)
    model = load(REPO)
    assert bits(model.params) == bits(load_params(tiny, model.policy.model.config))


def refused(path: str) -> str:
    with pytest.raises(HubError) as error:
        fetch_weights(locate(config_of(path)))
    return str(error.value)


def test_what_the_hub_refuses_is_said_in_one_message_each(tiny, tmp_path, loopback):
    loopback.push(REPO, tiny)
    assert "'acme/none': no folder of that name here, and the hub has no model of that name" in (
        refused("acme/none")
    )
    assert "and the model on the hub has no revision 'v9'; expected" in refused(f"{REPO}@v9")
    loopback.push("acme/gated", tiny)
    loopback.gated.add("acme/gated")
    assert "accept them at https://huggingface.co/acme/gated, then log in" in refused("acme/gated")
    (tiny / "model.safetensors").rename(tmp_path / "elsewhere")
    loopback.push("acme/pickled", tiny, pytorch_model_DOT_bin=b"pickle")
    assert "on the hub it has no model.safetensors; expected the format" in refused("acme/pickled")
    (tiny / "config.json").unlink()
    loopback.push("acme/gguf", tiny, tiny_DOT_gguf=b"another format")
    assert "on the hub it has no config.json; expected the format" in refused("acme/gguf")


@pytest.mark.filterwarnings("ignore:Not enough free disk space")
def test_a_full_disk_is_named(tiny, loopback, full_disk, monkeypatch):
    monkeypatch.setattr(theirs, "HF_HUB_CACHE", str(full_disk))
    (tiny / "model.safetensors").write_bytes(b"x" * (2 << 20))
    loopback.push(REPO, tiny)
    config = locate(config_of(REPO))
    with pytest.raises(WriteError, match=f"cannot write {full_disk}: No space left"):
        fetch_weights(config)


# --- from the cache, and by hand ------------------------------------------------------------------


def keep(cache: Path, source: Path, commit: str = "0123456789" * 4, branch: str = "main") -> Path:
    """A snapshot as `huggingface_hub` lays it down: links to blobs, and a file for the branch."""
    repo = cache / f"models--{REPO.replace('/', '--')}"
    folder = repo / "snapshots" / commit
    for path in (folder, repo / "blobs", repo / "refs"):
        path.mkdir(parents=True, exist_ok=True)
    for number, path in enumerate(sorted(source.iterdir())):
        shutil.copyfile(path, repo / "blobs" / f"{commit[:6]}{number}")
        (folder / path.name).symlink_to(Path("../../blobs") / f"{commit[:6]}{number}")
    (repo / "refs" / branch).write_text(commit)
    return folder


@pytest.fixture(params=["HF_HUB_OFFLINE", "no network"])
def reason(request, monkeypatch, cache) -> str:
    """The hub cannot be asked; what is said of it."""
    if request.param == "HF_HUB_OFFLINE":
        monkeypatch.setattr(theirs, "HF_HUB_OFFLINE", True)
        return "the hub was not asked (HF_HUB_OFFLINE is set)"
    use("http://127.0.0.1:9", monkeypatch)
    return "the hub cannot be reached (ConnectError: "


def test_without_the_hub_the_cache_is_used_and_says_so(tiny, cache, reason, capsys):
    folder = keep(cache, tiny)
    config = locate(config_of(REPO))
    fetch_weights(config)
    assert folder_of(config) == folder
    line = capsys.readouterr().err
    assert line.startswith(f"{REPO}: {reason}") and line.count("\n") == 1
    assert line.endswith("commit 012345678901 from the cache is used\n")
    assert folder_of(locate(config_of(f"{REPO}@{folder.name}"))) == folder
    assert capsys.readouterr().err.startswith(f"{REPO}@{folder.name}: {reason}")
    assert dict(check_inputs(config))["policy"].endswith("commit 012345678901")
    model = load(REPO)
    assert bits(model.params) == bits(load_params(tiny, model.policy.model.config))


def test_a_hub_that_fails_is_one_that_cannot_be_reached(tiny, cache, loopback, capsys):
    folder = keep(cache, tiny)
    loopback.is_down = True
    assert folder_of(locate(config_of(REPO))) == folder
    assert f"{REPO}: the hub cannot be reached (HfHubHTTPError: " in capsys.readouterr().err


def test_with_neither_hub_nor_cache_it_is_said_what_to_place_where(cache, reason):
    message = refused("acme/tiny-2.5@v1")
    assert f"Model.path = '{REPO}@v1': no folder of that name here, {reason}" in message
    for part in (
        "the cache lacks it; place config.json, tokenizer.json, tokenizer_config.json, model.safe",
        "in a folder models/tiny-2.5 (where there is a network: "
        f"`hf download {REPO} --revision v1 --local-dir models/tiny-2.5`)",
        "set Model.path = 'models/tiny-2.5'",
    ):
        assert part in message


def test_a_cache_without_the_weights_is_told_apart(tiny, cache, reason):
    keep(cache, tiny).joinpath("model.safetensors").unlink()
    message = refused(REPO)
    assert reason in message and "the cache lacks its model.safetensors; place" in message


def test_a_plan_without_the_hub_says_so_and_takes_the_packaged_shape(cache, reason):
    shape = read_shape(config_of("Qwen/Qwen2.5-0.5B"))
    assert shape.config.hidden_size == 896
    assert shape.source.startswith("the packaged shape Qwen2.5-0.5B.json, since Model.path = ")
    assert reason in shape.source
    with pytest.raises(ConfigError, match="no packaged shape is named 'Other'.*hub"):
        read_shape(config_of("Qwen/Other"))


@pytest.mark.parametrize("path", ["models/nowhere", "./acme/tiny", "tiny", "a b/c", "acme/tiny/"])
def test_a_mistyped_folder_is_told_both_possibilities(cache, path):
    with pytest.raises(DataError, match=r"no such folder; .* or a name on the Hugging Face hub"):
        check_inputs(locate(config_of(path)))


# --- the commit of a run --------------------------------------------------------------------------


def begin(config: Config) -> None:
    """What a run writes until its first checkpoint is there."""
    Path(config.run_folder).mkdir(exist_ok=True)
    claim_folder(config, folder_of(config))
    step = Path(config.run_folder) / "checkpoints" / "2"
    step.mkdir(parents=True, exist_ok=True)
    (step / "manifest.json").touch()


def test_a_run_keeps_its_commit_when_the_branch_moves(tmp_path, loopback):
    run = f"Run.folder = '{tmp_path / 'run'}'"
    first = loopback.push(REPO, save_tiny(tmp_path / "first"))
    config = locate(config_of(REPO, run), tmp_path / "run")
    fetch_weights(config)
    begin(config)
    second = loopback.push(REPO, save_tiny(tmp_path / "second", seed=1))
    again = locate(config_of(REPO, run), tmp_path / "run")
    assert folder_of(again).name == first
    (folder_of(again) / "training_args.json").write_text("{}")  # another program's, in the cache
    claim_folder(again, folder_of(again))
    for other in (tmp_path / "new", None):
        assert folder_of(locate(config_of(REPO, run), other)).name == second
    # Another text is another setting: `check_config` refuses it, or the person means it.
    pinned = locate(config_of(f"{REPO}@{second}", run), tmp_path / "run")
    assert folder_of(pinned).name == second


def test_a_run_keeps_its_teachers_commit_too(tmp_path, loopback):
    loopback.push(REPO, save_tiny(tmp_path / "policy"))
    first = loopback.push("acme/teacher", save_tiny(tmp_path / "first", seed=1))
    run = tmp_path / "run"
    settings = (f"Run.folder = '{run}'", "Teacher.path = 'acme/teacher'")

    def located() -> Config:
        return locate_teacher(locate(config_of(REPO, *settings), run), run)

    config = located()
    assert config.teacher_origin == (str(Path(config.teacher_folder or "")), first)
    fetch_weights(config)
    assert (Path(config.teacher_folder or "") / "model.safetensors").is_file()
    assert config.teacher_source() == f"acme/teacher, commit {first[:12]}"
    begin(config)
    record = json.loads((run / "teacher_files.json").read_text())["manifest"]
    assert (record["model"], record["commit"]) == ("acme/teacher", first)
    second = loopback.push("acme/teacher", save_tiny(tmp_path / "second", seed=2))
    assert located() == config and located().teacher_origin == config.teacher_origin
    assert str(locate_teacher(config_of(REPO, *settings)).teacher_folder).endswith(second)
    with pytest.raises(HubError, match=r"^Teacher.path = 'acme/nobody': no folder of that name"):
        locate_teacher(config_of(REPO, "Teacher.path = 'acme/nobody'"))


def test_before_there_are_results_a_run_takes_the_newest_commit(tmp_path, loopback):
    loopback.push(REPO, save_tiny(tmp_path / "first"))
    config = locate(config_of(REPO, f"Run.folder = '{tmp_path / 'run'}'"), tmp_path / "run")
    fetch_weights(config)
    Path(config.run_folder).mkdir()
    claim_folder(config, folder_of(config))
    second = loopback.push(REPO, save_tiny(tmp_path / "second", seed=1))
    assert folder_of(locate(config_of(REPO), tmp_path / "run")).name == second


def test_other_processes_take_the_first_ones_commit(tmp_path, loopback, monkeypatch):
    first = loopback.push(REPO, save_tiny(tmp_path / "first"))
    words = np.frombuffer(bytes.fromhex(first), np.uint32)
    second = loopback.push(REPO, save_tiny(tmp_path / "second", seed=1))
    monkeypatch.setattr(runtime, "check_same", lambda *_: None)
    monkeypatch.setattr(runtime, "on_main", lambda action: None)
    monkeypatch.setattr(runtime, "everyone", lambda x: np.stack([words, x]))
    config = locate(config_of(REPO))
    assert folder_of(config).name == first != second
    fetch_weights(config)
    assert (folder_of(config) / "model.safetensors").is_file()


TRAINING = (
    *("Train.iterations = 2", "Train.prompts_per_step = 2", "Train.prompts_per_minibatch = 2"),
    *("Evaluate.every = 0", "Evaluate.prompts = 2", "Evaluate.samples = 2", "Checkpoint.every = 1"),
    *("Metrics.tensorboard = False", "Sampler.max_prompt_tokens = 16", "Train.row_tokens = 32"),
)


def test_a_named_model_is_trained_checked_and_exported(tmp_path, loopback, monkeypatch, capsys):
    """Then the branch moves and the hub goes away: the run still knows its model."""
    commit = loopback.push(REPO, save_tiny(tmp_path / "first"))
    run = tmp_path / "run"
    config = config_of(REPO, f"Run.folder = '{run}'", *TRAINING)
    assert train.train(config) == 0
    out = capsys.readouterr().out
    assert f"policy                {REPO}, commit {commit[:12]}" in out
    assert f"fetching 1 file(s) of weights: {REPO}, commit {commit[:12]}" in out
    record = json.loads((run / "model_files.json").read_text())["manifest"]
    assert (record["model"], record["commit"]) == (REPO, commit)
    assert sorted(record["files"]) == sorted([*SETTINGS, "model.safetensors"])
    assert f"Model.path = '{REPO}'" in (run / "config.gin").read_text()

    loopback.push(REPO, save_tiny(tmp_path / "second", seed=1))
    assert train.train(config) == 0
    assert f"commit {commit[:12]}" in capsys.readouterr().out
    monkeypatch.setattr(theirs, "HF_HUB_OFFLINE", True)
    assert check.main([str(run), "--prompts", "2"]) == 0
    assert export.main([str(run), str(tmp_path / "out"), "--dtype", "float32"]) == 0
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (run / "model" / name).read_bytes()
