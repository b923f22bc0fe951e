"""Servers of the wire in processes of their own, ours and vLLM, and the clients' interpreters."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import string
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from toy import random_params

from aspo_jax.data.tokenizer import build_character_tokenizer
from aspo_jax.engines.owned import Owned
from aspo_jax.model import ModelConfig, build_model, save_model

MODEL = "policy"  # the name under which every server here serves its model
_PATIENCE_S = 300.0  # until a server or a client answers; vLLM takes about 100 to start


class Served(NamedTuple):
    """A server that answers.

    url: without a path. folder: of the model.
    """

    url: str
    folder: Path

    def ask(self, path: str, body: Any) -> Any:
        """The JSON that a route answers.

        Raises:
            AssertionError: any status but 200, with what the server said.
        """
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=_PATIENCE_S) as answer:
                return json.loads(answer.read())
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{path}: {error.code}: {error.read().decode()}") from error


def serving(folder: Path, log: Path) -> AbstractContextManager[Served]:
    """``python -m aspo_jax.serve`` of a folder."""
    command = f"{sys.executable} -m aspo_jax.serve {{model}} --port {{port}} --name {MODEL}"
    return _started(command, folder, log)


def vllm(folder: Path, log: Path, *flags: str) -> AbstractContextManager[Served]:
    """The vLLM of ``ASPO_VLLM``, the path of its executable, on the CPU and in float32."""
    command = f"""env VLLM_SERVER_DEV_MODE=1 VLLM_CPU_KVCACHE_SPACE=1 VLLM_NO_USAGE_STATS=1
      VLLM_CPU_OMP_THREADS_BIND=nobind OMP_NUM_THREADS={os.cpu_count()} {os.environ["ASPO_VLLM"]}
      serve {{model}} --port {{port}} --host 127.0.0.1 --served-model-name {MODEL} --dtype float32
      --enforce-eager --max-model-len 1024 --max-num-seqs 16 --generation-config vllm
      --logprobs-mode processed_logprobs --seed 0 {" ".join(flags)}"""
    return _started(command, folder, log)


@contextlib.contextmanager
def _started(command: str, folder: Path, log: Path) -> Iterator[Served]:
    """A server's command, once it answers; it ends with the block."""
    process = Owned(command, log)
    try:
        url = process.start(folder)
        end = time.monotonic() + _PATIENCE_S
        while not _is_healthy(url):
            assert process.is_running and time.monotonic() < end, process.state()
            time.sleep(0.1)
        yield Served(url, folder)
    finally:
        process.stop()


def _is_healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


def client_python(package: str, variable: str = "ASPO_CLIENTS") -> str:
    """An interpreter that has a client: this one, or that of an environment variable."""
    return sys.executable if importlib.util.find_spec(package) else os.environ[variable]


def run_client(python: str, *words: str, cwd: Path | None = None, **environment: str) -> str:
    """What a client prints; a client's failure is the test's, with its last words."""
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONWARNINGS")}
    done = subprocess.run(
        [python, *words],
        env=clean | environment,
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=_PATIENCE_S,
    )
    said = f"{done.stdout[-6000:]}\n{done.stderr[-6000:]}"
    assert done.returncode == 0, f"exit status {done.returncode}\n{said}"
    return done.stdout


# --- the models that are served -------------------------------------------------------------------


def write_toy(folder: Path, seed: int = 0) -> Path:
    """A random network that speaks every printable character of ASCII; a Hugging Face folder."""
    tokenizer = build_character_tokenizer(string.printable[:95] + "\n")
    shape = ModelConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        layers=2,
        heads=4,
        kv_heads=2,
        head_dim=32,
    )
    params = random_params(build_model(shape), seed, scale=0.1)
    save_model(folder, params, shape, tokenizer.save_pretrained, eos_token_id=2)
    return folder


def real_model(name: str = "smollm2") -> Path:
    """A folder below ``ASPO_MODELS``; skips where there is none."""
    folder = Path(os.environ.get("ASPO_MODELS", "/nowhere")) / name
    if not folder.is_dir():
        pytest.skip(f"ASPO_MODELS names no folder of {name}")
    return folder
