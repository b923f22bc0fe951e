"""The policy network: a Qwen2 transformer as pure functions over a nested dict of arrays."""

from aspo_jax.model.cache import Cache as Cache
from aspo_jax.model.hf import ModelFolderError as ModelFolderError
from aspo_jax.model.hf import load_params as load_params
from aspo_jax.model.hf import read_model_config as read_model_config
from aspo_jax.model.hf import save_model as save_model
from aspo_jax.model.qwen import Model as Model
from aspo_jax.model.qwen import ModelConfig as ModelConfig
from aspo_jax.model.qwen import build_model as build_model
from aspo_jax.model.sharding import RULES as RULES
from aspo_jax.model.sharding import batch_sharding as batch_sharding
from aspo_jax.model.sharding import partition_spec as partition_spec
from aspo_jax.model.sharding import shardings as shardings

__all__ = [
    "RULES",
    "Cache",
    "Model",
    "ModelConfig",
    "ModelFolderError",
    "batch_sharding",
    "build_model",
    "load_params",
    "partition_spec",
    "read_model_config",
    "save_model",
    "shardings",
]
