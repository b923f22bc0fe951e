"""When an engine is believed to have new weights, and the files that it is given."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file
from toy import bits, random_params, toy_model

from aspo_jax.engines.weights import (
    Publisher,
    Version,
    folder_of_run,
    probe_problem,
    write_head,
)
from aspo_jax.model import load_params, save_model

rng = np.random.default_rng(0)
OURS = -rng.exponential(3.0, 40)
MOVE = rng.normal(0.0, 1.0, 40)


def version(probe_T: np.ndarray, is_new: bool = True) -> Version:
    return Version("x", Path("v1"), probe_T, is_new)


def problem(
    moved: float, noise: float, *, share: float = 1.0, again: bool = True, is_new: bool = True
):
    """Of an engine whose kernels differ from ours by ``noise``, after it took a share of a move.

    again: its rounding is another in the second answer.
    """
    kernels = rng.normal(0.0, noise, 40)
    before_T = OURS + kernels
    other = rng.normal(0.0, noise / 10, 40) if again else 0.0
    heard_T = before_T + share * moved * MOVE + other
    new = version(OURS + moved * MOVE, is_new)
    return probe_problem(heard_T, new, before_T, version(OURS), 0.1)


@pytest.mark.parametrize("noise", [0.0, 1e-5, 1e-2])
@pytest.mark.parametrize("moved", [1e-6, 1e-4, 1e-2, 0.05, 1.0])
def test_new_weights_are_believed(moved, noise):
    assert problem(moved, noise) is None


@pytest.mark.parametrize("share", [0.0, 0.3, 0.8, -0.2])
@pytest.mark.parametrize("moved", [1e-3, 1e-2, 0.08])
def test_old_weights_are_not_believed(moved, share):
    said = problem(moved, 1e-5, share=share)
    assert said and re.search(r"moved otherwise than ours, by .* it still has old weights", said)


def test_an_answer_that_did_not_move_at_all_tells_even_below_the_rounding():
    assert problem(2e-3, 1e-2, share=0.0, again=False)
    assert problem(2e-3, 1e-2, share=0.0, again=True) is None, "too little to tell"
    assert problem(2e-3, 1e-2, share=0.0, again=False, is_new=False) is None, "nothing changed"


def test_the_mean_difference_is_bounded():
    assert "0.5 nats from ours on average" in str(
        probe_problem(OURS + 0.5, version(OURS), None, None, 0.1)
    )
    assert probe_problem(OURS + 0.05, version(OURS), None, None, 0.1) is None
    assert probe_problem(np.full(40, np.nan), version(OURS), None, None, 0.1)


def test_a_version_is_whole_when_it_has_its_name(tmp_path):
    seen = []

    def save(params: bytes, folder: Path) -> None:
        seen.append(sorted(path.name for path in tmp_path.glob("all/*")))
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(params)
        (folder / "config.json").write_text("{}")

    (tmp_path / "all" / "v9").mkdir(parents=True)  # of a run that was killed
    publisher = Publisher(tmp_path / "all", save, lambda params: OURS)
    versions = [publisher.publish(data) for data in (b"a", b"a", b"b")]
    assert seen == [[], ["v1"], ["v2"]]
    assert [v.is_new for v in versions] == [True, False, True]
    assert len({v.label for v in versions}) == 3
    fourth = publisher.publish(b"c", in_use={versions[1].folder})
    there = sorted(str(p.relative_to(tmp_path / "all")) for p in tmp_path.glob("all/*/*"))
    assert there == [
        *("v2/config.json", "v3/config.json", "v3/model.safetensors"),
        *("v4/config.json", "v4/model.safetensors"),
    ]
    assert fourth.folder.name == "v4" and fourth.label not in {v.label for v in versions}
    publisher.close()
    assert not (tmp_path / "all").exists()


@pytest.mark.parametrize("shard", [10**9, 3000])
def test_a_tied_head_is_written_too(tmp_path, shard):
    model = toy_model(tie_embeddings=True)
    params = random_params(model)
    folder = tmp_path / "model"
    save_model(
        folder,
        params,
        model.config,
        lambda path: None,
        eos_token_id=2,
        dtype="bfloat16",
        max_shard_bytes=shard,
    )
    write_head(folder)
    with safe_open(folder / "lm_head.safetensors", "np") as file:
        assert list(file.keys()) == ["lm_head.weight"]
    loaded = {}
    for path in folder.glob("*.safetensors"):
        loaded |= load_file(path)
    head, embedding = loaded["lm_head.weight"], loaded["model.embed_tokens.weight"]
    assert head.dtype == embedding.dtype and np.array_equal(head, embedding)
    again = load_params(folder, model.config)
    expected = jax.tree.map(lambda x: np.asarray(x, "bfloat16").astype(np.float32), params)
    assert bits(again) == bits(expected), "whoever ties the two ignores it"
    index = folder / "model.safetensors.index.json"
    assert index.exists() == (shard == 3000)
    if index.exists():
        assert (
            json.loads(index.read_text())["weight_map"]["lm_head.weight"] == "lm_head.safetensors"
        )


def test_runs_do_not_share_a_folder(tmp_path):
    one, other = (folder_of_run(tmp_path, Path(name)) for name in ("runs/a", "runs/b"))
    assert one != other and one == folder_of_run(tmp_path, Path(os.path.abspath("runs/a")))
