"""The policy network, a dense decoder: pure functions over a nested dict of arrays."""

from aspo_jax.model.attention import Attention, AttentionError, choose_attention
from aspo_jax.model.cache import Cache, Decode, Extend, Prefill, cache_specs
from aspo_jax.model.decoder import Model, build_model
from aspo_jax.model.hf import load_params
from aspo_jax.model.hf_config import ModelFolderError, parse_model_config, read_model_config
from aspo_jax.model.hf_generation import read_eos_ids
from aspo_jax.model.hf_save import save_model
from aspo_jax.model.lora import Lora, attached_axes, is_adapted, merge, trained_part
from aspo_jax.model.paged import choose_in_place
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
    "Lora",
    "Model",
    "ModelConfig",
    "ModelFolderError",
    "Prefill",
    "Yarn",
    "attached_axes",
    "batch_sharding",
    "build_model",
    "cache_specs",
    "choose_attention",
    "choose_in_place",
    "is_adapted",
    "load_params",
    "map_axes",
    "merge",
    "parameter_axes",
    "parse_model_config",
    "partition_spec",
    "read_eos_ids",
    "read_model_config",
    "save_model",
    "shardings",
    "trained_part",
    "unstack",
]
