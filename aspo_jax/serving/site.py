"""What the routes share: the models by name, the settings, the requests under way."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

from starlette.requests import Request as HttpRequest

from aspo_jax.serving.bodies import read_object
from aspo_jax.serving.errors import ApiError, shown
from aspo_jax.serving.running import Registry
from aspo_jax.serving.seam import Engine, Served
from aspo_jax.serving.texts import Vocabulary

T = TypeVar("T")


class Settings(NamedTuple):
    """How the routes behave.

    api_key: what clients must send as ``Authorization: Bearer``; None: nothing.
    is_admin: whether there are routes that load weights, pause and abort.
    trusts_templates: whether a request may bring its own chat template, which is a program.
    body_limit: longest body of a request, bytes.
    most_prompts: in one request. most_sequences: prompts times n.
    patience: seconds in which a client must take an event of a stream.
    created: when the models came to be, seconds since 1970; None: when the app was made.
    """

    api_key: str | None = None
    is_admin: bool = False
    trusts_templates: bool = False
    body_limit: int = 32 * 2**20
    most_prompts: int = 1024
    most_sequences: int = 4096
    patience: float = 300.0
    created: int | None = None


class Model(NamedTuple):
    """A served model as the routes use it."""

    name: str
    engine: Engine
    vocabulary: Vocabulary
    served: Served


class Site:
    """The models by name, the settings, the requests under way.

    Tokenizers and templates work in one thread beside the event loop, in turn.
    """

    def __init__(self, models: Mapping[str, Served], settings: Settings):
        if not models:
            raise ValueError("no model to serve, expected at least one by its name")
        self.models = {
            name: Model(name, served.engine, Vocabulary(served.policy.tokenizer), served)
            for name, served in models.items()
        }
        self.settings = settings
        self.created = int(time.time()) if settings.created is None else settings.created
        self.registry = Registry()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")

    def model(self, name: Any) -> Model:
        """A model that can be asked; None: the first.

        Raises:
            ApiError: there is none of that name, or its engine has failed.
        """
        if name is None:
            name = next(iter(self.models))
        if not isinstance(name, str):
            raise ApiError(f"model = {shown(name)}: expected a text", param="model")
        if name not in self.models:
            known = ", ".join(self.models)
            raise ApiError(
                f"The model `{name}` does not exist. Served here: {known}.",
                status=404,
                param="model",
            )
        model = self.models[name]
        if not model.engine.is_alive:
            raise ApiError(f"the engine of {name} has failed; restart the server", status=500)
        return model

    async def body(self, request: HttpRequest) -> dict[str, Any]:
        """The JSON object of a request."""
        return await read_object(request, self.settings.body_limit)

    async def in_thread(self, work: Callable[[], T]) -> T:
        """What a function returns that may take a while."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)


def site_of(request: HttpRequest) -> Site:
    """The site that a request came to."""
    return request.app.state.site
