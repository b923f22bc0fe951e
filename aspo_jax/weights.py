"""The weights that a run has: all of them trained, or an adapter beside frozen ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from aspo_jax.config import Config
from aspo_jax.model import load_params
from aspo_jax.model.peft import Base, load_adapter, save_adapter
from aspo_jax.model.quantised import load_int8
from aspo_jax.model.sharding import placed
from aspo_jax.policy import Policy
from aspo_jax.run.folder import INITIAL_MODEL
from aspo_jax.run.records import Saved, check_base, trained_weights

_ADAPTER = 0x10AA  # names the draw of an adapter among those of the run's seed


def load_frozen(config: Config, policy: Policy, folder: str | Path, mesh: Mesh) -> Any:
    """The weights that adapters are trained beside, as the run holds them; None: there are none."""
    if policy.lora is None:
        return None
    network = policy.model
    if policy.lora.is_int8:
        return load_int8(folder, network.config, mesh)
    places, dtype = network.shardings(mesh), jnp.dtype(config.frozen_dtype)
    return load_params(folder, network.config, shardings=places, dtype=dtype)


def load_initial(config: Config, policy: Policy, folder: str | Path, mesh: Mesh) -> Any:
    """What a run trains, as it starts: the weights of a folder, or an adapter.

    Raises:
        ModelFolderError: the folder, or that of ``Lora.path``, cannot be used.
    """
    network, lora = policy.model, policy.lora
    places = policy.trained.shardings(mesh)
    if lora is None:
        return load_params(folder, network.config, shardings=places)
    key = jax.random.fold_in(jax.random.key(config.run.seed), np.uint32(_ADAPTER))
    if config.lora.path is not None:
        return load_adapter(config.lora.path, network.config, lora, mesh, key)
    return jax.jit(policy.trained.init, out_shardings=places)(key)


def load_start(config: Config, policy: Policy, folder: str | Path, mesh: Mesh) -> Any:
    """The params of a policy that a run would start from; see `load_initial`."""
    frozen = load_frozen(config, policy, folder, mesh)
    return policy.trained.whole(load_initial(config, policy, folder, mesh), frozen)


def load_saved(
    saved: Saved, config: Config, policy: Policy, mesh: Mesh, dtype: Any = jnp.float32
) -> tuple[int, Any]:
    """The step of a run and its params; where adapters were trained, these beside the frozen ones.

    One process. config: the run's, located, as far as it says what its weights are.
    dtype: of the params where all were trained.

    Raises:
        CheckpointError: there is no such step, or it cannot be used.
        ModelChanged: adapters were trained beside another model than is there now.
    """
    if policy.lora is None:
        return _trained(saved, config, policy, mesh, dtype)
    step, adapter = load_adapter_of(saved, config, policy, mesh)
    frozen = load_frozen(config, policy, base_folder(config, saved.run), mesh)
    return step, policy.trained.whole(adapter, frozen)


def load_adapter_of(saved: Saved, config: Config, policy: Policy, mesh: Mesh) -> tuple[int, Any]:
    """The step of a run that trained an adapter, and that; see `load_saved`."""
    check_base(saved.run, config, base_folder(config, saved.run))
    return _trained(saved, config, policy, mesh, jnp.float32)


def _trained(
    saved: Saved, config: Config, policy: Policy, mesh: Mesh, dtype: Any
) -> tuple[int, Any]:
    shapes = jax.eval_shape(policy.trained.init, jax.random.key(0))
    wanted = placed(shapes, policy.trained.shardings(mesh))
    return trained_weights(saved, config, jax.tree.map(lambda x: x.update(dtype=dtype), wanted))


def base_folder(config: Config, run: Path) -> Path:
    """The folder of the model that a run started from."""
    folder = config.model_folder
    return run / INITIAL_MODEL if folder is None else Path(folder).expanduser()


def save_trained_adapter(config: Config, policy: Policy, adapter: Any, folder: Path) -> None:
    """Write an adapter that names the model of the run as its base."""
    if policy.lora is None:
        raise ValueError("policy.lora is None, expected a policy whose adapter was trained")
    name = config.model.path or str(policy.source)
    commit = config.origin and config.origin.commit
    if commit:
        name = name.partition("@")[0]
    elif config.model.path:
        name = str(Path(name).expanduser().absolute())
    save_adapter(folder, adapter, policy.model.config, policy.lora, Base(name, commit))
