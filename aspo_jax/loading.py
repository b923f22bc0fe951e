"""A model that a person names, a folder or a run, opened for sampling without a learner."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh

from aspo_jax import hub, runtime
from aspo_jax.config import Config
from aspo_jax.config.gin import Binding
from aspo_jax.config.reading import changed_config
from aspo_jax.config.suites import bound
from aspo_jax.errors import UserError
from aspo_jax.files import digest, digests
from aspo_jax.model import ModelConfig
from aspo_jax.model.sharding import row_shards
from aspo_jax.origin import fetch_weights
from aspo_jax.parts import FACTORIES, build_sampler
from aspo_jax.paths import user_path
from aspo_jax.policy import Policy
from aspo_jax.run.checkpoint import MANIFEST, Checkpoints
from aspo_jax.run.folder import CHECKPOINTS, INITIAL_MODEL
from aspo_jax.run.records import NoRun, Saved, find_run, run_config
from aspo_jax.sampler import PagedSampler
from aspo_jax.weights import load_saved, load_start

_FILES = (".safetensors", ".json", ".jinja", ".txt")  # weights, settings, tokenizer
ROOM = 64  # prompts are padded to a multiple, so that similar ones share a compiled program


class ModelError(UserError):
    """Neither a model nor a run, or a step that a run has not."""


class Named(NamedTuple):
    """A model as a person named it.

    path: a Hugging Face folder or a name on the hub: config and tokenizer, and the weights too,
        unless they are of a run's step.
    settings: of the run, as far as they say what a response is and what its weights are.
    """

    path: str
    saved: Saved | None = None
    settings: Mapping[str, Any] = {}

    @property
    def name(self) -> str:
        """As a folder may be called."""
        if self.saved is not None:
            return f"{self.saved.run.name}-{self.saved.step}"
        return Path(os.path.abspath(Path(self.path).expanduser())).name.replace("@", "-")


def find_model(text: str, step: int | None = None) -> Named:
    """The model of a folder or a hub name, or of a run's step, by default the newest that verifies.

    Raises:
        UserError: there is none.
    """
    path = user_path(text, "MODEL_OR_RUN")
    try:
        saved = find_run(path)
    except NoRun:
        return _no_run(path, text, step)
    config = run_config(saved.run, FACTORIES)
    if step is not None and saved.step not in (None, step):
        raise ModelError(f"{text} is one step, and --checkpoint {step} another; leave one out")
    step = _step(saved, config) if step is None and saved.step is None else step or saved.step
    place = saved.run / CHECKPOINTS / str(step)
    if not (place / MANIFEST).is_file():
        steps = [p.parent.name for p in (saved.run / CHECKPOINTS).glob(f"*/{MANIFEST}")]
        there = ", ".join(sorted(steps, key=int)) or "none"
        raise ModelError(f"--checkpoint {step}: {saved.run} has no such step; complete: {there}")
    s = config.sampler
    said = {"Model.dtype": config.model.dtype, "Run.seed": config.run.seed}
    if config.lora.rank is not None:
        said |= {f"Lora.{name}": value for name, value in config.lora_shape.items()}
    said |= {"Sampler.stop_ids": s.stop_ids, "Sampler.stop_strings": s.stop_strings}
    return Named(config.model.path or str(saved.run / INITIAL_MODEL), Saved(saved.run, step), said)


def named_config(model: Named, text: str, settings: Mapping[str, Binding]) -> Config:
    """The default config with a model, what its run says of it, and settings, which win.

    text: the model as a person named it, for messages.

    Raises:
        ConfigError: every mistake in the settings.
    """
    said = {key: bound(value, text) for key, value in model.settings.items()}
    path = {"Model.path": bound(model.path, "MODEL_OR_RUN")}
    return changed_config(said | path | dict(settings), FACTORIES)


def _no_run(path: Path, text: str, step: int | None) -> Named:
    if step is not None:
        raise ModelError(f"--checkpoint {step}: {path} is no run; leave it out")
    is_name = not path.exists() and hub.parse_name(text) is not None
    if not is_name and not (path / "config.json").is_file():
        found = "a folder without config.json" if path.is_dir() else "no such folder"
        raise ModelError(
            f"{path}: {found}; expected a Hugging Face model folder (config.json, tokenizer, "
            "safetensors), a name on the hub (owner/name) or a run folder (config.gin, checkpoints)"
        )
    return Named(text)


def _step(saved: Saved, config: Config) -> int:
    with Checkpoints(saved.run / CHECKPOINTS, config.checkpoint.keep) as checkpoints:
        step = checkpoints.newest_step()
    if step is None:
        raise ModelError(
            f"{saved.run}: no complete checkpoint as yet; the run saves every "
            f"{config.checkpoint.every} iterations (Checkpoint.every) and when it is stopped"
        )
    return step


def identity(model: Named, config: Config) -> dict[str, Any]:
    """What a model is: its commit on the hub or its bytes, which take a second per GB to read."""
    run, step = model.saved or (None, None)
    path = str(run or model.path)
    origin = config.origin
    if origin is not None and origin.commit is not None and run is None:
        return {"path": path, "step": None, "digest": origin.commit}
    files = digests(
        Path(config.model_folder or ""), lambda name: "/" not in name and name.endswith(_FILES)
    )
    if run is not None:
        manifest = digest(epath.Path(run / CHECKPOINTS / str(step) / MANIFEST))
        if config.lora.rank is None:  # else the frozen weights are part of it
            files = {k: v for k, v in files.items() if not k.endswith(".safetensors")}
        files[MANIFEST] = manifest
    return {"path": path, "step": step, "digest": _digest(files)}


def _digest(files: Mapping[str, Mapping[str, Any]]) -> str:
    lines = "".join(f"{name} {files[name]['sha256']}\n" for name in sorted(files))
    return hashlib.sha256(lines.encode()).hexdigest()


def load_weights(model: Named, config: Config, policy: Policy, mesh: Mesh) -> Any:
    """The weights, on the devices of the mesh; config: a located one.

    Raises:
        UserError: they cannot be read.
    """
    if model.saved is None:
        fetch_weights(config)
        return load_start(config, policy, config.model_folder or model.path, mesh)
    if not runtime.is_alone():
        raise ModelError(
            f"{model.saved.run}: a checkpoint is read by one process; export it first "
            "(python -m aspo_jax.export) and evaluate the folder"
        )
    return load_saved(model.saved, config, policy, mesh)[1]


# --- a sampler that has room ----------------------------------------------------------------------


def fitted_sampler(
    config: Config,
    policy: Policy,
    mesh: Mesh,
    *,
    longest_prompt: int,
    max_tokens: int,
    slots: int,
    samples: int,
) -> PagedSampler:
    """A sampler for prompts and responses of these lengths.

    slots: sequences at once; made a multiple of what the devices share.
    samples: per prompt; so many fewer prompts are read at once.
    """
    sampler = dataclasses.replace(
        config.sampler,
        max_prompt_tokens=rounded(longest_prompt, ROOM),
        max_response_tokens=max_tokens,
        slots=rounded(slots, row_shards(mesh)),
    )
    train = dataclasses.replace(config.train, samples_per_prompt=samples)
    return build_sampler(dataclasses.replace(config, sampler=sampler, train=train), policy, mesh)


def rounded(number: int, step: int) -> int:
    """Up to the next multiple."""
    return math.ceil(number / step) * step


_MOST = {"cpu": 16}  # sequences at once beyond which nothing is won; of accelerators 256


def affordable_slots(shape: ModelConfig, dtype: str, tokens: int, mesh: Mesh) -> int:
    """How many sequences of so many tokens may be decoded at once, by the size of the memory.

    Their keys and values may take a quarter of a machine's memory, a half of an accelerator's.
    """
    device = mesh.devices.flat[0]
    position = 2 * shape.layers * shape.kv_heads * shape.head_dim * jnp.dtype(dtype).itemsize
    if device.platform == "cpu":
        room = _host_memory() / 4
    else:
        room = (device.memory_stats() or {}).get("bytes_limit", 8 * 2**30) / 2 * mesh.size
    return int(max(1, min(_MOST.get(device.platform, 256), room // (position * tokens))))


def _host_memory() -> int:
    """Bytes that this process may use: the machine's, or what a container has of it."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return memory
    return min(memory, int(limit)) if limit.isdecimal() else memory
