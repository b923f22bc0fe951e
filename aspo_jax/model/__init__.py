"""The policy network, Qwen2 or Qwen3: pure functions over a nested dict of arrays."""

from aspo_jax.model.attention import Attention as Attention
from aspo_jax.model.attention import AttentionError as AttentionError
from aspo_jax.model.attention import choose_attention as choose_attention
from aspo_jax.model.cache import Cache as Cache
from aspo_jax.model.cache import Decode as Decode
from aspo_jax.model.cache import Prefill as Prefill
from aspo_jax.model.cache import cache_specs as cache_specs
from aspo_jax.model.hf import load_params as load_params
from aspo_jax.model.hf_config import ModelFolderError as ModelFolderError
from aspo_jax.model.hf_config import parse_model_config as parse_model_config
from aspo_jax.model.hf_config import read_model_config as read_model_config
from aspo_jax.model.hf_generation import read_eos_ids as read_eos_ids
from aspo_jax.model.hf_save import save_model as save_model
from aspo_jax.model.qwen import Model as Model
from aspo_jax.model.qwen import ModelConfig as ModelConfig
from aspo_jax.model.qwen import Yarn as Yarn
from aspo_jax.model.qwen import build_model as build_model
from aspo_jax.model.qwen import unstack as unstack
from aspo_jax.model.sharding import RULES as RULES
from aspo_jax.model.sharding import batch_sharding as batch_sharding
from aspo_jax.model.sharding import partition_spec as partition_spec
from aspo_jax.model.sharding import shardings as shardings

__all__ = [
    "RULES",
    "Attention",
    "AttentionError",
    "Cache",
    "Decode",
    "Model",
    "ModelConfig",
    "ModelFolderError",
    "Prefill",
    "Yarn",
    "batch_sharding",
    "build_model",
    "cache_specs",
    "choose_attention",
    "load_params",
    "parse_model_config",
    "partition_spec",
    "read_eos_ids",
    "read_model_config",
    "save_model",
    "shardings",
    "unstack",
]
