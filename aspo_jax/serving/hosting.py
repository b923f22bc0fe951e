"""A server from its beginning to its end: models are opened, followed, served, and closed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from aspo_jax import runtime
from aspo_jax.config.gin import Binding
from aspo_jax.errors import UserError
from aspo_jax.loading import find_model
from aspo_jax.run.console import Console
from aspo_jax.serving.app import create_app
from aspo_jax.serving.engine import Device
from aspo_jax.serving.opening import Opened, Room, has_checkpoint, newer_weights, open_model
from aspo_jax.serving.seam import EngineError
from aspo_jax.serving.server import run_server
from aspo_jax.serving.site import Settings

__all__ = ["Hosting", "Room", "Settings", "host"]


class Hosting(NamedTuple):
    """What is served, how, and where.

    models: as a person names them. names: what clients call them; none: their own.
    settings: of a config, see `open_model`. is_raw: see `aspo_jax.sampler.Serving`.
    follows: seconds between two looks for newer checkpoints of a run; None: it stays as it is.
    drain: seconds that what runs has to finish after a signal.
    """

    models: Sequence[str]
    names: Sequence[str]
    settings: Mapping[str, Binding]
    room: Room
    is_raw: bool
    follows: float | None
    routes: Settings
    host: str
    port: int
    drain: float
    shows_requests: bool


def host(h: Hosting, console: Console) -> None:
    """Serve until a signal.

    Raises:
        UserError: a model cannot be opened, or the address cannot be had.
    """
    device = Device()
    with console, runtime.compilations(console.compiling, console.compiled):
        models = _open_all(h, device, console)
        app = create_app({name: each.served for name, each in models.items()}, h.routes)
        followers: list[asyncio.Task[None]] = []  # the loop alone keeps no task alive

        def ready(address: str, port: int) -> None:
            if h.follows is not None:
                loop = asyncio.get_running_loop()
                each = (_follow(*model, console, h.follows) for model in models.items())
                followers.extend(map(loop.create_task, each))
            where = f"http://{address}:{port}"
            console.note(f"serving {', '.join(models)} at {where}  (page: {where}/)", "bold")

        run_server(
            app, h.host, h.port, drain=h.drain, on_bound=ready, shows_requests=h.shows_requests
        )
    device.close()
    console.note("stopped: nothing runs any more")


def _open_all(h: Hosting, device: Device, console: Console) -> dict[str, Opened]:
    """Every model by the name that clients use."""
    if h.follows is not None:
        for text in h.models:
            _await_checkpoint(text, console, h.follows)
    found = [find_model(text) for text in h.models]  # which reads a run's newest step whole
    names = h.names or [named.name for named in found]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"two models are called {twice[0]}; give each a --name")
    models: dict[str, Opened] = {}
    for name, named, text in zip(names, found, h.models, strict=True):
        start = time.perf_counter()
        opened = open_model(named, text, h.settings, h.room, device, is_raw=h.is_raw)
        models[name] = opened
        slots, window = opened.limits.slots, opened.limits.window
        seconds = time.perf_counter() - start
        console.note(
            f"{name}: {slots} sequences at once, {window:,} tokens each at most, "
            f"{opened.config.model.dtype}; loaded and compiled in {seconds:,.0f} s"
        )
    return models


def _await_checkpoint(text: str, console: Console, every_s: float) -> None:
    """Return once a run has a complete step."""
    if not has_checkpoint(text):
        console.note(f"{text}: no complete checkpoint as yet; waiting for the first")
    while not has_checkpoint(text):
        time.sleep(every_s)


async def _follow(name: str, opened: Opened, console: Console, every_s: float) -> None:
    """Serve each new checkpoint of a run."""
    refused = ""
    while opened.engine.is_alive:
        try:
            weights = await asyncio.to_thread(newer_weights, opened)
            if weights is not None:
                await opened.engine.follow(weights)
                console.note(f"{name}: step {weights.label} is served now")
            refused = ""
        except (UserError, EngineError) as error:
            if str(error) != refused:  # it may be pruned while it is read, or damaged for good
                console.note(f"{name}: {error}; step {opened.engine.version} goes on", "yellow")
            refused = str(error)
        await asyncio.sleep(every_s)
