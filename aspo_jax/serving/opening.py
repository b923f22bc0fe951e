"""A model that a person names, ready to be served."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jax.sharding import Mesh

from aspo_jax import runtime
from aspo_jax.config import Config
from aspo_jax.config.gin import Binding
from aspo_jax.errors import UserError
from aspo_jax.loading import Named, affordable_slots, load_weights, named_config, rounded
from aspo_jax.model import Model, load_params
from aspo_jax.model.sharding import row_shards
from aspo_jax.origin import locate
from aspo_jax.parts import build_sampling_network
from aspo_jax.paths import user_path
from aspo_jax.policy import Policy, load_policy
from aspo_jax.run.checkpoint import MANIFEST
from aspo_jax.run.folder import CHECKPOINTS
from aspo_jax.run.records import NoRun, Saved, find_run
from aspo_jax.sampler import SERVE, Limits, PagedSampler, Request, Serving, make_publish
from aspo_jax.serving.engine import Device, DeviceEngine, Weights
from aspo_jax.serving.scoring import make_scorer
from aspo_jax.serving.seam import Served

LISTED = 20  # of the likeliest ids that a request may ask for
WINDOW = 4096  # tokens of prompt and response where the model would take more
_PAGE = 64


class Room(NamedTuple):
    """How much a server takes on.

    window: longest prompt and response together, in tokens; None: the model's, at most `WINDOW`.
    slots: sequences that are drawn at once; None: what memory and processor are good for.
    cache_tokens: positions in all pages; None: a full window for each slot.
    queue: sequences that may run and wait together.
    """

    window: int | None = None
    slots: int | None = None
    cache_tokens: int | None = None
    queue: int = 1024


class Opened(NamedTuple):
    """A model on the devices, and where its weights come from."""

    named: Named
    config: Config
    policy: Policy
    mesh: Mesh
    limits: Limits
    engine: DeviceEngine

    @property
    def run(self) -> Path | None:
        """The folder of the run that it is of."""
        return self.named.saved and self.named.saved.run

    @property
    def served(self) -> Served:
        return Served(self.engine, self.policy, str(self.run or self.named.path))


def open_model(
    named: Named,
    text: str,
    settings: Mapping[str, Binding],
    room: Room,
    device: Device,
    *,
    is_raw: bool = False,
) -> Opened:
    """Load a folder, a hub name or a run, and compile what answers a request.

    text: the model as a person named it, for messages.
    settings: of a config, as far as they mean something here.
    is_raw: see `aspo_jax.sampler.Serving`.

    Raises:
        UserError: what a person must mend.
    """
    config = named_config(named, text, settings)
    mesh = runtime.start(**dataclasses.asdict(config.runtime))
    config = locate(config, named.saved and named.saved.run)
    policy = load_policy(config, config.model_folder, mesh)
    network, sampler = _sampler(config, policy, mesh, room, is_raw)
    sampler.start(load_weights(named, config, policy, mesh))

    def read(folder: str) -> Any:
        return load_params(folder, policy.model.config, shardings=policy.model.shardings(mesh))

    _warm_up(sampler)
    engine = DeviceEngine(
        device,
        sampler,
        score=make_scorer(network, policy.head, sampler.limits.window or WINDOW, LISTED),
        read=read,
        limit=room.queue,
        version="default" if named.saved is None else str(named.saved.step),
    )
    return Opened(named, config, policy, mesh, sampler.limits, engine)


def _sampler(
    config: Config, policy: Policy, mesh: Mesh, room: Room, is_raw: bool
) -> tuple[Model, PagedSampler]:
    """The network as the sampler runs it, and the sampler."""
    shape, local = policy.model.config, runtime.local_mesh(mesh)
    window, shards = _window(shape.max_position, room.window), row_shards(local)
    slots = room.slots or affordable_slots(shape, config.model.dtype, window, local)
    lengths = dataclasses.replace(
        config.sampler, max_prompt_tokens=window - 1, max_response_tokens=window - 1
    )
    config = dataclasses.replace(config, sampler=lengths)
    model = build_sampling_network(config, shape, local)
    is_cpu = local.devices.flat[0].platform == "cpu"
    chunk = _PAGE if is_cpu else 8 * _PAGE
    limits = Limits(
        window - 1,
        window - 1,
        rounded(slots, shards),
        policy.stop_ids,
        prompts=rounded(slots, shards),
        prefill=chunk if is_cpu else 4 * chunk,
        page=_PAGE,
        cache_tokens=room.cache_tokens,
        cache_type=config.sampler.cache_type,
        read=64 if is_cpu else 512,
        block=4 if is_cpu else 8,
        window=window,
        chunk=chunk,
    )
    try:
        sampler = PagedSampler(
            model,
            policy.head,
            limits,
            local,
            seed=config.run.seed,
            choice=Serving(is_raw, LISTED),
            publish=make_publish(model, mesh, local, config.model.dtype),
        )
    except ValueError as error:
        raise UserError(f"{error} (--cache-tokens)") from error
    return model, sampler


def _window(longest: int, asked: int | None) -> int:
    if asked is None:
        return min(longest, WINDOW)
    if not 2 <= asked <= longest:
        raise UserError(
            f"--window {asked}: expected 2 to {longest}, which the model's config.json gives as "
            "its longest text (max_position_embeddings)"
        )
    return asked


def _warm_up(sampler: PagedSampler) -> None:
    """Compile, so that nobody waits for it later."""
    list(sampler.sample([Request((0, 0), (SERVE, 0, 0, 0), 1)]))


def has_checkpoint(text: str) -> bool:
    """Whether a run that a person names has a complete step; a folder without steps needs none."""
    try:
        saved = find_run(user_path(text, "MODEL_OR_RUN"))
    except NoRun:
        return True
    return saved.step is not None or bool(_steps(saved.run))


def _steps(run: Path) -> list[int]:
    """The steps of a run that were completed."""
    return [int(path.parent.name) for path in (run / CHECKPOINTS).glob(f"*/{MANIFEST}")]


def newer_weights(opened: Opened) -> Weights | None:
    """The weights of a run's newest step, where it is another than the one that is served.

    Raises:
        UserError: they do not verify.
    """
    run, served = opened.run, opened.engine.version
    if run is None:
        return None
    newest = max(_steps(run), default=None)
    if newest is None or (served.isdecimal() and newest <= int(served)):
        return None
    named = opened.named._replace(saved=Saved(run, newest))
    return Weights(load_weights(named, opened.config, opened.policy, opened.mesh), str(newest))
