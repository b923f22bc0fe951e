"""The prompts of a run, from its config: sources, mixtures, what is left out, and the stream."""

import collections
import json
import sys

import pytest

from aspo_jax.build import check_inputs
from aspo_jax.config import ConfigError, read_config
from aspo_jax.data import CHARACTERS, DataError, build_character_tokenizer
from aspo_jax.inputs import (
    build_prompts,
    data_kinds,
    held_out_prompts,
    held_out_source,
    train_source,
)
from aspo_jax.parts import FACTORIES


@pytest.fixture(scope="module")
def tokenizer():
    return build_character_tokenizer(CHARACTERS)


def config_of(*settings):
    sizes = ("Train.prompts_per_step=4", "Train.prompts_per_minibatch=4", "Model.path=unread")
    flags = [word for setting in (*sizes, *settings) for word in ("--set", setting)]
    return read_config(["--config", "countdown_cpu", *flags], FACTORIES)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def sums(count, start=0):
    return [
        {"id": str(i), "prompt": f"{i}+1", "answer": i + 1, "kind": "exact"}
        for i in range(start, start + count)
    ]


@pytest.fixture
def files(tmp_path):
    """Settings that name a training file of 10 rows and a held-out one of 6."""
    train = write(tmp_path / "train.jsonl", sums(10))
    held_out = write(tmp_path / "eval.jsonl", sums(6, start=50))
    return ["Data.source=files", f"Data.train_path={train}", f"Data.eval_path={held_out}"]


def ids(stream, steps):
    return [prompt.id for _ in range(steps) for prompt in next(stream)]


# --- the map --------------------------------------------------------------------------------------


def test_settings_name_the_fields(tmp_path, tokenizer):
    rows = [{"n": i, "q": {"text": f"{i}"}, "gold": f"so #### {i}", "hint": "+"} for i in range(4)]
    path = write(tmp_path / "mine.jsonl", rows)
    config = config_of(
        "Data.source=files",
        f"Data.train_path={path}",
        f"Data.eval_path={path}",
        "Data.id=n",
        "Data.prompt=q.text",
        "Data.answer=gold",
        "Data.answer_pattern='#### (.*)'",
        "Data.grader=math",
        "Data.template='{prompt}{hint}1'",
    )
    prompt, *_ = held_out_prompts(config, tokenizer)
    assert (prompt.id, prompt.text, prompt.answer, prompt.kind) == ("0", "<bos>0+1>", "0", "math")
    assert prompt.columns["hint"] == "+"
    assert data_kinds(config) == {"math"}


def verl(index, source="aime2024"):
    return {
        "data_source": source,
        "prompt": [{"role": "user", "content": "1"}],
        "reward_model": {"ground_truth": "1"},
        "extra_info": {"index": index},
        "other": {"truth": "2", "name": f"n{index}", "text": "3"},
    }


def test_a_layout_is_a_preset_and_settings_win(tmp_path, tokenizer):
    path = write(tmp_path / "mine.jsonl", [verl(7), verl(7)])
    data = ["Data.source=files", f"Data.train_path={path}", f"Data.eval_path={path}"]

    def first(*settings):
        config = config_of(*data, "Data.layout=verl", *settings)
        return train_source(config, tokenizer).rows[0]

    row = first()
    assert (row["id"], row["answer"], row["kind"]) == ("1", "1", "math")  # 7 is no name of one
    assert first("Data.answer=other.truth")["answer"] == "2"
    assert first("Data.prompt=other.text")["question"] == "3"
    assert first("Data.grader=exact")["kind"] == "exact"
    with pytest.raises(DataError, match="mine.jsonl:2: found id '7' again"):
        first("Data.id=extra_info.index")


# --- what is left out -----------------------------------------------------------------------------


def test_what_is_left_out_is_counted_in_the_start_table(tmp_path, files):
    bad = [{"prompt": "1"}, {"prompt": "1", "answer": 0.5, "kind": "exact"}]
    long = [{"id": "long", "prompt": "1" * 90, "answer": "1", "kind": "exact"}]
    write(tmp_path / "train.jsonl", [*sums(10), *bad, *long, *sums(1, start=50)])
    write(tmp_path / "eval.jsonl", [*sums(6, start=50), *bad[:1]])
    model = tmp_path / "model"
    build_character_tokenizer(CHARACTERS).save_pretrained(model)
    shape = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    shape |= {"intermediate_size": 8, "vocab_size": 64, "model_type": "qwen2"}
    (model / "config.json").write_text(json.dumps(shape))
    switches = ["Data.bad_rows=skip", "Data.too_long=skip", "Data.overlap_words=3"]
    table = dict(check_inputs(config_of(*files, *switches, f"Model.path={model}")))
    assert table["rows left out"] == "train: 2 bad, 1 too long, 1 held out; held out: 1 bad"
    assert table["prompts"].endswith("10 rows")
    write(tmp_path / "train.jsonl", sums(10))
    write(tmp_path / "eval.jsonl", sums(6, start=50))
    assert "rows left out" not in dict(check_inputs(config_of(*files, f"Model.path={model}")))


def test_too_long_prompts(tmp_path, files, tokenizer):
    write(tmp_path / "train.jsonl", [*sums(2), {**sums(1)[0], "id": "x", "prompt": "1" * 90}])
    with pytest.raises(DataError, match=r"train.jsonl:3 .id x.: found a prompt of 92 tokens.*drop"):
        train_source(config_of(*files), tokenizer)
    source = train_source(config_of(*files, "Data.too_long=skip"), tokenizer)
    assert (len(source.rows), source.too_long) == (2, 1)


def test_training_rows_that_are_held_out_are_left_out(tmp_path, files, tokenizer):
    write(tmp_path / "train.jsonl", [*sums(3), *sums(2, start=52)])
    assert len(train_source(config_of(*files), tokenizer).rows) == 5
    source = train_source(config_of(*files, "Data.overlap_words=3"), tokenizer)
    assert [row["id"] for row in source.rows] == ["0", "1", "2"] and source.held_out == 2
    write(tmp_path / "train.jsonl", sums(2, start=52))
    with pytest.raises(DataError, match="found 2 training rows .* that are all held out too"):
        train_source(config_of(*files, "Data.overlap_words=3"), tokenizer)


# --- mixtures -------------------------------------------------------------------------------------


@pytest.fixture
def mixture(tmp_path, files):
    """Rows 0-9 of weight 3 and rows 100-103 of weight 1."""
    more = write(tmp_path / "more.jsonl", sums(4, start=100))
    return [
        *files,
        "Data.mixture=('a', 'b')",
        "Data.a.weight=3.0",
        f"Data.b.train_path={more}",
        f"Data.b.eval_path={more}",
    ]


def test_weights_are_respected(mixture, tokenizer):
    found = ids(build_prompts(config_of(*mixture), tokenizer), 40)
    counts = collections.Counter(int(name) // 100 for name in found)
    assert counts == {0: 120, 1: 40}
    for start in range(0, 160, 4):  # in every step too
        assert sum(int(name) >= 100 for name in found[start : start + 4]) == 1
    per_row = collections.Counter(name for name in found)
    assert {per_row[str(i)] for i in range(10)} == {12}  # epochs of each source's own
    assert {per_row[str(i)] for i in range(100, 104)} == {10}


def test_a_mixture_is_the_same_again_and_goes_on(mixture, tokenizer):
    config = config_of(*mixture)
    whole = ids(build_prompts(config, tokenizer), 12)
    assert ids(build_prompts(config, tokenizer), 12) == whole
    other = config_of(*mixture, "Run.seed=1")
    assert ids(build_prompts(other, tokenizer), 12) != whole
    for done in (0, 1, 5, 11):
        stream = build_prompts(config, tokenizer)
        stream.restore(done)
        assert ids(stream, 12 - done) == whole[4 * done :]
        assert stream.state() == 12


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_the_steps_of_a_mixture(mixture, tokenizer, processes):
    config = config_of(*mixture)
    whole = [next(stream) for stream in [build_prompts(config, tokenizer)] for _ in range(6)]
    streams = [build_prompts(config, tokenizer, i, processes) for i in range(processes)]
    for step in whole:
        shares = [next(stream) for stream in streams]
        assert [share[0].draw for share in shares] == [p.draw for p in step[:processes]]
        assert sorted((p for share in shares for p in share), key=lambda p: p.draw) == step


def test_the_held_out_rows_of_a_mixture_are_in_proportion(mixture, tokenizer):
    prompts = held_out_prompts(config_of(*mixture, "Evaluate.prompts=4"), tokenizer)
    assert sorted(prompt.id for prompt in prompts) == ["100", "50", "51", "52"]
    prompts = held_out_prompts(config_of(*mixture, "Evaluate.prompts=99"), tokenizer)
    assert len(prompts) == len({prompt.id for prompt in prompts}) == 10
    assert len(held_out_source(config_of(*mixture), tokenizer).rows) == 10


def test_puzzles_in_a_mixture(files, tokenizer):
    config = config_of(*files, "Data.mixture=('a', 'puzzles')", "Data.puzzles.source=countdown")
    kinds = collections.Counter(
        prompt.kind for step in [next(build_prompts(config, tokenizer))] for prompt in step
    )
    assert kinds == {"exact": 2, "countdown": 2}
    assert data_kinds(config) == {"exact", "countdown"}


def test_counts_of_a_mixture_are_added(tmp_path, mixture, tokenizer):
    write(tmp_path / "more.jsonl", [*sums(4), {"prompt": ""}])
    write(tmp_path / "train.jsonl", [*sums(4), {"prompt": ""}, {"prompt": ""}])
    source = train_source(config_of(*mixture, "Data.bad_rows=skip"), tokenizer)
    assert source.bad == 3
    config = config_of(*mixture, "Data.a.bad_rows=skip")
    with pytest.raises(DataError, match="more.jsonl:5: found"):
        train_source(config, tokenizer)


def test_a_file_that_was_mended_is_read_again(tmp_path, files, tokenizer):
    config = config_of(*files)
    assert len(train_source(config, tokenizer).rows) == 10
    write(tmp_path / "train.jsonl", sums(3))
    assert len(train_source(config, tokenizer).rows) == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["Data.mixture=('a', 'b')", "Data.c.weight=2.0"], "unknown section Data.c"),
        (["Data.mixture=('a', 'b')", "Data.a.weigth=2.0"], "no field weigth .did you mean weight"),
        (["Data.mixture=('a', 'b')", "Data.a.weight=0.0"], "Data.a.weight.*> 0"),
        (
            ["Data.mixture=('a', 'b')", "Data.a.source=fils"],
            "unknown source .fils. .did you mean files",
        ),
        (
            ["Data.mixture=('a', 'b')", "Data.a.answer_pattern='('"],
            "Data.a.answer_p.*no regular",
        ),
        (["Data.mixture=('a', 'b')", "Data.a.layout=vrl"], "Data.a.layout.*'plain', 'verl'"),
        (["Data.mixture=('a', 'a')"], "names 'a' twice"),
        (["Data.mixture=('a b', 'c')"], "'a b' cannot be a label"),
        (["Data.mixture=('weight', 'c')"], "'weight' cannot be a label"),
        (["Data.a.weight=2.0"], "unknown section Data.a"),
        (["Data.answer_pattern='(a)(b)'"], "has 2 groups, expected at most one"),
        (["Data.layout=vrl"], "expected one of 'plain', 'verl'"),
    ],
)
def test_mistakes_of_the_section(files, settings, message):
    with pytest.raises(ConfigError, match=message):
        config_of(*files, *settings)


# --- sources of one's own -------------------------------------------------------------------------

OWN = """
import random

def sums(wanted, *, largest: int = 9):
    draw = random.Random(f"{wanted.split} {wanted.seed}")
    for _ in range(wanted.size or 20):
        a, b = draw.randrange(largest), draw.randrange(largest)
        yield {"prompt": f"{a}+{b}", "answer": a + b, "kind": "exact"}

def broken(wanted):
    return [{"prompt": "1"}]

def fails(wanted):
    return 1 / 0
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "own_sums.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("own_sums", None)


def test_a_factory_of_ones_own(own, tokenizer):
    config = config_of("Data.source=own_sums:sums", "sums.largest=5", "Evaluate.prompts=8")
    rows = train_source(config, tokenizer).rows
    assert len(rows) == 20 and all(0 <= row["answer"] <= 8 for row in rows)
    assert rows[3]["where"] == "own_sums:sums (train) row 4"
    held_out = held_out_prompts(config, tokenizer)
    assert len(held_out) == 8
    assert train_source(config_of("Data.source=own_sums:sums"), tokenizer).rows != rows


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("own_sums:broken", DataError, r"own_sums:broken .train. row 1: found no field 'kind'"),
        (
            "own_sums:fails",
            ConfigError,
            "'own_sums:fails' fails: .*division by zero at .*own_sums.py:14",
        ),
    ],
)
def test_a_factory_that_is_wrong(own, tokenizer, source, error, message):
    with pytest.raises(error, match=message):
        train_source(config_of(f"Data.source={source}"), tokenizer)
