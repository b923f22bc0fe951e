"""The command that serves a run: what clients get, while checkpoints come and signals too."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import pytest

from aspo_jax import serve
from aspo_jax.data import encode
from aspo_jax.library import load, sample

FLAGS = ("--window", "24", "--slots", "4", "--name", "tiny", "--admin")
PROMPT = "3 4 7 = "


class Server(NamedTuple):
    """A process that serves, and where."""

    url: str
    log: Path
    process: subprocess.Popen[bytes]

    def ask(self, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        headers = {"content-type": "application/json"}
        request = urllib.request.Request(self.url + path, data, headers)
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.loads(answer.read())


@contextlib.contextmanager
def serving(folder: Path, log: Path, *flags: str) -> Iterator[Server]:
    """A child that serves a folder on a free port."""
    words = [sys.executable, "-m", "aspo_jax.serve", str(folder), "--port", "0", *flags]
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}  # one CPU device
    with log.open("wb") as out:
        process = subprocess.Popen(words, env=environment, stdout=out, stderr=out)
    try:
        wait_for(lambda: process.poll() is not None or " at http" in log.read_text(), 300)
        found = re.search(r" at (http://\S+)", log.read_text())
        assert found, log.read_text()
        yield Server(found[1], log, process)
    finally:
        process.kill()
        process.wait()


def wait_for(is_true: Any, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.fixture(scope="module")
def cached(monkeypatch_module) -> None:
    """The servers share the programs of the test session."""
    settings: Any = jax.config
    monkeypatch_module.setenv("JAX_COMPILATION_CACHE_DIR", settings.jax_compilation_cache_dir)


@pytest.fixture(scope="module")
def monkeypatch_module():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def served(finished, tmp_path_factory, cached):
    log = tmp_path_factory.mktemp("served") / "log"
    with serving(finished.folder / "model", log, *FLAGS) as server:
        yield server


def ask(server: Server, **fields: Any) -> Any:
    return server.ask("/v1/completions", {"max_tokens": 12, "return_token_ids": True} | fields)


def test_the_likeliest_text_is_that_of_the_library(served, finished):
    model = load(finished.folder / "model")
    tokens = encode(model.policy.tokenizer, PROMPT)
    (choice,) = ask(served, prompt=tokens, temperature=0)["choices"]
    ((answer,),) = sample(model, [PROMPT], max_tokens=12, temperature=0.0)
    assert choice["token_ids"] == answer.completion.tokens_T.tolist()
    assert choice["text"] == answer.text
    assert choice["finish_reason"] == answer.completion.ending


def test_one_request_has_the_same_bytes_alone_and_in_a_crowd(served):
    requests = [
        {"prompt": PROMPT[: 1 + n % 8], "seed": n, "temperature": 0.5 + n % 3 / 2, "n": 1 + n % 2}
        for n in range(40)
    ]
    alone = [ask(served, **request)["choices"] for request in requests]
    with concurrent.futures.ThreadPoolExecutor(40) as pool:
        crowd = list(pool.map(lambda r: ask(served, **r)["choices"], reversed(requests)))
    assert crowd[::-1] == alone
    assert len({str(choices) for choices in alone}) > 20


def version(server: Server) -> str:
    return server.ask("/weight_info")["weight_version"]


def test_a_run_under_way_is_followed_from_step_to_step(finished, tmp_path, cached):
    """The run's folder holds one step at first; a damaged one is passed over."""
    run = tmp_path / "run"
    shutil.copytree(finished.folder, run)
    *_, early, late = sorted((run / "checkpoints").iterdir(), key=lambda path: int(path.name))
    hidden = tmp_path / late.name
    late.rename(hidden)
    with serving(run, tmp_path / "log", *FLAGS, "--follow", "0.2") as server:
        assert version(server) == early.name
        before = ask(server, prompt=PROMPT, temperature=0, logprobs=1)["choices"]
        weights = max(hidden.rglob("*"), key=lambda path: path.stat().st_size * path.is_file())
        whole = weights.read_bytes()
        weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        hidden.rename(late)
        wait_for(lambda: f"step {early.name} goes on" in server.log.read_text())
        assert ask(server, prompt=PROMPT, temperature=0, logprobs=1)["choices"] == before
        (late / weights.relative_to(hidden)).write_bytes(whole)
        wait_for(lambda: version(server) == late.name)
        after = ask(server, prompt=PROMPT, temperature=0, logprobs=1)["choices"]
        assert after != before
    with serving(late, tmp_path / "other", *FLAGS) as server:
        assert ask(server, prompt=PROMPT, temperature=0, logprobs=1)["choices"] == after


def test_a_signal_lets_what_runs_finish(finished, tmp_path, cached):
    with serving(finished.folder / "model", tmp_path / "log", *FLAGS) as server:
        wanted = {"prompt": PROMPT, "ignore_eos": True, "max_tokens": 16, "n": 64}
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            answer = pool.submit(lambda: ask(server, **wanted))
            time.sleep(0.2)
            server.process.send_signal(signal.SIGTERM)
            lengths = [len(choice["token_ids"]) for choice in answer.result()["choices"]]
        assert lengths == [16] * 64
        assert server.process.wait(30) == 0
    assert "stopped: nothing runs any more" in server.log.read_text()


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["nowhere"], "nowhere: no such folder; expected a Hugging Face model folder"),
        (["nowhere", "--set", "Train.epochs=2"], "--set #1: Train.epochs means nothing to a"),
        (["nowhere", "--slots", "0"], "--slots 0: expected 1 or more"),
        (["nowhere", "--name", "a", "--name", "b"], "1 models and 2 times --name"),
        (["{model}", "--window", "99999999"], "--window 99999999: expected 2 to"),
        (["{model}", "--cache-tokens", "9"], "cannot hold a sequence of full length"),
        (["{model}", "{model}", "--window", "24"], "two models are called model; give each"),
        (["{model}", "--window", "24", "--host", "no.such"], "host 'no.such'"),
    ],
)
def test_a_mistake_is_named(words, found, finished, capsys, cached):
    model = str(finished.folder / "model")
    try:
        status = serve.main([word.format(model=model) for word in words])
    except SystemExit as error:
        status = error.code
    assert status == 2 and found in capsys.readouterr().err


def test_the_package_can_be_without_a_server():
    program = "import sys; sys.modules['starlette'] = None; from aspo_jax.serve import main"
    words = [sys.executable, "-c", f"{program}; sys.exit(main(['nowhere']))"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 2 and "pip install 'aspo_jax[serve]'" in done.stderr
