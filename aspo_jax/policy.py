"""The policy of a run, from its config: network, tokenizer and head; its weights are apart."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from aspo_jax.config import Config, ConfigError
from aspo_jax.data import allowed_ids, copy_tokenizer, load_vocabulary
from aspo_jax.errors import UserError
from aspo_jax.head import Head
from aspo_jax.inputs import start_tokenizer
from aspo_jax.learner import Teacher
from aspo_jax.model import (
    Lora,
    Model,
    ModelConfig,
    build_model,
    choose_attention,
    merge,
    read_eos_ids,
    read_model_config,
    save_model,
    trained_part,
)
from aspo_jax.model.lora import Trained
from aspo_jax.model.paged import InPlace
from aspo_jax.rollout import Decode
from aspo_jax.runtime import MeshError


class Policy(NamedTuple):
    """A network, its tokenizer and how its logits become a distribution; weights are apart.

    decode: token ids -> text, special tokens not shown.
    stop_ids: what ends a response, in sampling and in the export; the tokenizer's <eos> first.
    source: the folder it came from; None for a new one.
    lora: the adapters that are trained beside its weights; None: all weights are.
    """

    model: Model
    tokenizer: Any
    decode: Decode
    head: Head
    stop_ids: tuple[int, ...]
    source: Path | None = None
    lora: Lora | None = None

    @property
    def trained(self) -> Trained:
        """What a run trains of it."""
        return trained_part(self.model, self.lora)


def load_policy(config: Config, folder: str | Path | None, mesh: Mesh) -> Policy:
    """The policy of a Hugging Face folder; None: a new one of the config's sizes."""
    tokenizer = start_tokenizer(folder)
    ends = stop_ids(config, tokenizer, folder)
    shape = network_shape(config, folder, len(tokenizer))
    head = Head(
        temperature=config.sampler.temperature,
        is_allowed_V=allowed_ids(tokenizer, shape.vocab_size, ends),
        chunk=config.train.head_chunk,
        mesh=mesh,
    )
    return Policy(
        model=build_network(config, shape, mesh, config.train.row_tokens),
        tokenizer=tokenizer,
        decode=functools.partial(tokenizer.decode, skip_special_tokens=True),
        head=head,
        stop_ids=ends,
        source=None if folder is None else Path(folder),
        lora=build_lora(config),
    )


def build_lora(config: Config) -> Lora | None:
    """The adapters of the config; None: it trains all weights."""
    asked = config.lora
    if asked.rank is None:
        return None
    is_int8 = config.frozen_dtype == "int8"
    return Lora(asked.rank, asked.alpha, asked.targets, asked.is_rank_stabilised, is_int8)


def load_teacher(config: Config, policy: Policy, mesh: Mesh) -> Teacher:
    """The network of ``Teacher.path``, whose distribution has the policy's temperature and ids.

    Raises:
        ConfigError: see `check_teacher`; an axis of it does not split over the mesh.
    """
    check_teacher(config, policy.tokenizer)
    shape = read_model_config(str(config.teacher_folder))
    is_allowed_V = allowed_ids(policy.tokenizer, shape.vocab_size, policy.stop_ids)
    try:
        model = build_network(config, shape, mesh, config.train.row_tokens)
    except MeshError as error:
        raise ConfigError(f"Teacher.path = {config.teacher.path!r}: {error}") from error
    return Teacher(model, policy.head._replace(is_allowed_V=is_allowed_V))


def check_teacher(config: Config, tokenizer: Any) -> None:
    """The teacher's folder can be read, and its tokens are those of the policy's tokenizer.

    Raises:
        ConfigError: they are not; with both folders and the first token that differs.
    """
    found, folder = f"Teacher.path = {config.teacher.path!r}", Path(str(config.teacher_folder))
    if not (folder.expanduser() / "config.json").is_file():
        raise ConfigError(
            f"{found}: no config.json there; expected a Hugging Face model folder, or a name on "
            "the hub such as Qwen/Qwen2.5-7B-Instruct"
        )
    try:
        shape, theirs = read_model_config(folder), load_vocabulary(folder)
    except UserError as error:
        raise ConfigError(f"{found}: {error}") from error
    ours = tokenizer.get_vocab()
    if theirs != ours:
        policy = config.model_folder or "the new model of the config"
        raise ConfigError(
            f"{found} has other tokens than the policy, {policy}: {_difference(theirs, ours)}; "
            "expected the same ids for the same tokens, as models of one family have them"
        )
    if len(tokenizer) > shape.vocab_size:
        raise ConfigError(
            f"{found}: the tokenizer has {len(tokenizer)} tokens and the model only "
            f"{shape.vocab_size}; tokenizer and weights are from different models"
        )


def _difference(theirs: dict[str, int], ours: dict[str, int]) -> str:
    """The first id that is not the same token in both vocabularies, and what it is in each."""
    of_theirs, of_ours = ({i: token for token, i in x.items()} for x in (theirs, ours))
    first = min(i for i in {*of_theirs, *of_ours} if of_theirs.get(i) != of_ours.get(i))
    said = [repr(x[first]) if first in x else "no token" for x in (of_theirs, of_ours)]
    return f"id {first} is {said[0]} there and {said[1]} here"


def stop_ids(config: Config, tokenizer: Any, folder: str | Path | None = None) -> tuple[int, ...]:
    """What ends a response: <eos>, what generation_config.json adds to it, ``Sampler.stop_ids``.

    folder: of the model; None for a new one.

    Raises:
        ConfigError: an id that no token has.
        ModelFolderError: generation_config.json cannot be used.
    """
    tokens, own = len(tokenizer), config.sampler.stop_ids
    if wrong := [i for i in own if not 0 <= i < tokens]:
        raise ConfigError(
            f"Sampler.stop_ids = {own}: found {wrong[0]}, expected ids of the tokenizer, 0 to "
            f"{tokens - 1}; leave it out"
        )
    theirs = () if folder is None else read_eos_ids(folder, tokens)
    return tuple(dict.fromkeys((tokenizer.eos_token_id, *theirs, *own)))


def network_shape(config: Config, folder: str | Path | None, vocab_size: int) -> ModelConfig:
    """The network's shape: that of a folder; None: a new one's with this vocabulary."""
    return new_shape(config, vocab_size) if folder is None else read_model_config(folder)


def new_shape(config: Config, vocab_size: int) -> ModelConfig:
    """The network that the config's own sizes describe."""
    m = config.model
    names = ("hidden_size", "intermediate_size", "layers", "heads", "kv_heads")
    sizes = {name: getattr(m, name) for name in names}
    return ModelConfig(
        vocab_size=vocab_size,
        head_dim=sizes["hidden_size"] // sizes["heads"],
        rope_theta=m.rope_theta,
        tie_embeddings=m.tie_embeddings,
        **sizes,
    )


def build_network(
    config: Config,
    shape: ModelConfig,
    mesh: Mesh,
    row_tokens: int,
    platform: str | None = None,
    *,
    is_stacked: bool = True,
    in_place: InPlace | None = None,
) -> Model:
    """The network of a shape, with the attention that the mesh's devices do best.

    platform: of those devices; needed where the mesh is abstract or its devices name it otherwise.
    is_stacked, in_place: see `build_model`.

    Raises:
        MeshError: an axis of the network does not split over the mesh.
        AttentionError: the attention asked for cannot run there.
    """
    _check_splits(shape, mesh)
    dtype = jnp.dtype(config.model.dtype)
    attention = choose_attention(
        platform_of(mesh, platform),
        head_dim=shape.head_dim,
        row_tokens=row_tokens,
        packed=config.train.pack,
        dtype=dtype,
        mesh=mesh,
        name=config.model.attention,
    )
    return build_model(
        shape,
        dtype=dtype,
        remat=config.model.remat,
        attention=attention,
        mesh=mesh,
        is_stacked=is_stacked,
        in_place=in_place,
    )


def fewest_sequences(*networks: Model | None) -> int | None:
    """The most sequences that may share a row which all these networks read; None: any number."""
    limits = (network.attention.sequences for network in networks if network)
    return min((limit for limit in limits if limit), default=None)


def platform_of(mesh: Mesh, platform: str | None) -> str:
    """Of the devices of a mesh, where it is not given."""
    return platform or mesh.devices.flat[0].platform


def _check_splits(shape: ModelConfig, mesh: Mesh) -> None:
    sizes = {
        "tensor": (shape.heads, shape.kv_heads, shape.intermediate_size, shape.vocab_size),
        "fsdp": (shape.hidden_size,),
    }
    for axis, widths in sizes.items():
        devices = mesh.shape[axis]
        if any(width % devices for width in widths):
            raise MeshError(
                f"Runtime.{axis} = {devices} does not divide the model's {widths}; expected a "
                "common divisor of them"
            )


def save_policy(policy: Policy, params: Any, folder: str | Path, dtype: str = "float32") -> None:
    """Write a folder that `transformers` loads; what came with the model's own folder is kept.

    Adapters are merged.
    """
    save_tokenizer = policy.tokenizer.save_pretrained
    if policy.source is not None:
        save_tokenizer = functools.partial(copy_tokenizer, policy.source)
    save_model(
        folder,
        merge(params, jnp.dtype(dtype)),
        policy.model.config,
        save_tokenizer,
        eos_token_id=policy.stop_ids,
        source=policy.source,
        dtype=dtype,
    )


def parameter_count(params: Any) -> int:
    """Number of weights."""
    return int(sum(np.prod(x.shape) for x in jax.tree.leaves(params)))
