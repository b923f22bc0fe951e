"""The policy network, a dense decoder: pure functions over a nested dict of arrays."""

from aspo_jax.model.attention import Attention, AttentionError, choose_attention
from aspo_jax.model.cache import Cache, Decode, Extend, Prefill, cache_specs
from aspo_jax.model.decoder import Model, build_model
from aspo_jax.model.hf import load_params
from aspo_jax.model.hf_config import ModelFolderError, parse_model_config, read_model_config
from aspo_jax.model.hf_generation import read_eos_ids
from aspo_jax.model.hf_save import save_model
from aspo_jax.model.parameters import Llama3, ModelConfig, Yarn, parameter_axes, unstack
from aspo_jax.model.sharding import RULES, batch_sharding, map_axes, partition_spec, shardings

__all__ = [
    "RULES",
    "Attention",
    "AttentionError",
    "Cache",
    "Decode",
    "Extend",
    "Llama3",
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
    "map_axes",
    "parameter_axes",
    "parse_model_config",
    "partition_spec",
    "read_eos_ids",
    "read_model_config",
    "save_model",
    "shardings",
    "unstack",
]
