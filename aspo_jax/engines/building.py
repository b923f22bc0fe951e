"""From a config to a sampler that draws from its engines."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from aspo_jax.config import Config, ConfigError
from aspo_jax.engines.client import Engine
from aspo_jax.engines.external import ExternalSampler
from aspo_jax.engines.fleet import Fleet, Member, Patience
from aspo_jax.engines.owned import Owned
from aspo_jax.engines.remembered import Remembered
from aspo_jax.engines.weights import Publisher, default_folder, folder_of_run, write_head
from aspo_jax.engines.wire import WIRES, How
from aspo_jax.inputs import held_out_prompts
from aspo_jax.policy import Policy, save_policy
from aspo_jax.run.folder import DRAWN, ENGINE_LOG
from aspo_jax.sampler import stop_length
from aspo_jax.structs import Prompt
from aspo_jax.text_scores import make_rescore, score_texts

PROBE = 128  # tokens at most, of which engines say the log-probabilities after a reload


def build_external(config: Config, policy: Policy, mesh: Mesh) -> Remembered:
    """The sampler of ``Sampler.engine``, with a journal in the run's folder. Starts nothing.

    Raises:
        ConfigError: the run has several processes.
    """
    if jax.process_count() > 1:
        raise ConfigError(
            f"Sampler.engine = {config.sampler.engine!r} is for a run of one process, found "
            f"{jax.process_count()}; leave it out, or start one process"
        )
    s, run = config.sampler, Path(config.run_folder)
    prompts = held_out_prompts(config, policy.tokenizer)
    probe = _probe(prompts, s.max_prompt_tokens + s.max_response_tokens)
    parent = Path(s.weights_folder).expanduser() if s.weights_folder else default_folder()
    strings = s.stop_strings
    sampler = ExternalSampler(
        Fleet(_members(config, run), probe, s.max_gap, Patience(s.engine_start_s)),
        Publisher(
            folder_of_run(parent, run),
            functools.partial(_save, policy, s.weights_dtype or config.model.dtype, s.engine),
            probe_scorer(policy, mesh, probe),
        ),
        _how(config, policy),
        seed=config.run.seed,
        max_prompt_tokens=s.max_prompt_tokens,
        max_response_tokens=s.max_response_tokens,
        at_once=math.ceil(s.slots / config.train.samples_per_prompt),
        stops=functools.partial(stop_length, policy.decode, strings) if strings else None,
    )
    where = "Sampler.command" if s.command else ", ".join(s.addresses)
    return Remembered(
        sampler,
        run / DRAWN,
        # As many policies as a resume may have to go through again, and the one at work.
        keep=config.checkpoint.every + 1,
        temperature=s.temperature,
        description=(
            f"sampling from {s.engine} ({where}): what an engine draws is not repeatable, all else "
            f"is, bit for bit; what it drew is kept in {DRAWN}/ and not drawn again after a resume"
        ),
    )


def _members(config: Config, run: Path) -> list[Member]:
    s = config.sampler
    wire = WIRES[str(s.engine)]

    def engine(address: str = "") -> Engine:
        return Engine(wire, s.served_model, address, timeout_s=s.request_timeout_s)

    if s.command is not None:
        return [Member(engine(), Owned(s.command, run / ENGINE_LOG))]
    return [Member(engine(address)) for address in s.addresses]


def _how(config: Config, policy: Policy) -> How:
    is_allowed_V = np.asarray(policy.head.is_allowed_V)
    return How(
        temperature=config.sampler.temperature,
        top_k=0,
        top_p=1.0,
        min_p=0.0,
        stop_ids=policy.stop_ids,
        stop_strings=config.sampler.stop_strings,
        forbidden=tuple(np.flatnonzero(~is_allowed_V).tolist()),
        vocabulary=len(policy.tokenizer),
    )


def _save(policy: Policy, dtype: str, engine: str | None, params: Any, folder: Path) -> None:
    save_policy(policy, params, folder, dtype)
    if engine == "vllm" and policy.model.config.tie_embeddings:
        write_head(folder)


def _probe(prompts: Sequence[Prompt], window: int) -> list[int]:
    """The first tokens of some prompts: fixed, and such as the policy reads."""
    tokens = itertools.chain.from_iterable(prompt.tokens for prompt in prompts)
    return [int(token) for token in itertools.islice(tokens, min(PROBE, window - 1))]


def probe_scorer(policy: Policy, mesh: Mesh, probe: Sequence[int]) -> Callable[[Any], np.ndarray]:
    """params -> the trainer's log-probabilities of the probe, temperature 1, whole vocabulary."""
    rescore, text = make_rescore(policy.model, policy.head, mesh), np.array(probe)
    return lambda params: score_texts(rescore, params, mesh, [text])[0][0]
