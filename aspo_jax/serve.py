"""Serve a policy over the OpenAI routes, and token ids in and out, to any client of theirs.

    python -m aspo_jax.serve models/Qwen2.5-0.5B-Instruct
    python -m aspo_jax.serve runs/aspo --follow
    python -m aspo_jax.serve runs/aspo/checkpoints/10 runs/aspo/checkpoints/40

Open http://127.0.0.1:8000 for a page to talk to it. Only this machine can reach it unless --host
says otherwise. SIGTERM lets what runs finish; a second one ends it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence

from aspo_jax import runtime
from aspo_jax.config import ConfigError, gin
from aspo_jax.config.gin import Binding
from aspo_jax.errors import CommandParser, UserError, nearest, run_command
from aspo_jax.run.console import Console

SETTABLE = (  # of a training config, what means something here
    *("Model.dtype", "Model.attention", "Run.seed"),
    *("Sampler.stop_ids", "Sampler.cache_type", "Sampler.paged_kernel"),
    *("Runtime.data", "Runtime.fsdp", "Runtime.tensor"),
)
LOOK_S = 10.0  # between two looks for a newer checkpoint


def main(argv: Sequence[str] | None = None) -> int:
    """Serve what the command line names, until a signal; returns the exit status."""
    parser = _parser()
    a = parser.parse_args(argv)
    if len(a.name) not in (0, len(a.models)):
        parser.error(f"{len(a.models)} models and {len(a.name)} times --name: expected as many")
    status = run_command(lambda: _serve(a))
    return runtime.leave(status) if status == 2 else status


def _parser() -> CommandParser:
    parser = CommandParser("serve", __doc__)
    parser.add_argument(
        "models",
        nargs="+",
        metavar="MODEL_OR_RUN",
        help="a Hugging Face folder, a name on the hub, a run, or a step of it; several are served "
        "side by side",
    )
    parser.add_argument(
        "--name", action="append", default=[], help="what clients call it; once for each model"
    )
    parser.add_argument(
        "--follow",
        type=float,
        nargs="?",
        const=10.0,
        metavar="S",
        help="take a run's new checkpoints as they are saved; looks every S seconds, else 10",
    )
    parser.add_argument("--host", default="127.0.0.1", help="who may reach it (0.0.0.0: everyone)")
    parser.add_argument("--port", type=int, default=8000, help="0: any that is free")
    parser.add_argument("--api-key", metavar="KEY", help="clients must send it; else none")
    parser.add_argument(
        "--admin", action="store_true", help="routes that load weights, pause and abort"
    )
    parser.add_argument(
        "--window", type=int, metavar="TOKENS", help="longest prompt and response together"
    )
    parser.add_argument("--slots", type=int, metavar="N", help="sequences that are drawn at once")
    parser.add_argument(
        "--cache-tokens", type=int, metavar="N", help="positions in the cache, of all sequences"
    )
    parser.add_argument(
        "--queue", type=int, default=1024, metavar="N", help="sequences that may run and wait"
    )
    parser.add_argument(
        "--logprobs-mode",
        choices=("processed", "raw"),
        default="processed",
        help="of the distribution that was drawn from, or of the softmax at temperature 1",
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the computation")
    parser.add_argument(
        "--seed", type=int, help="of the server, with which those of requests are mixed"
    )
    parser.add_argument(
        "--drain", type=float, default=60.0, metavar="S", help="seconds to finish after SIGTERM"
    )
    parser.add_argument("--verbose", action="store_true", help="a line for each request")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="Section.field=value",
        help=f"one of {', '.join(SETTABLE)}",
    )
    return parser


def _settings(a: argparse.Namespace) -> Mapping[str, Binding]:
    """Bindings of the command line.

    Raises:
        ConfigError: of a setting that means nothing here.
    """
    flags = [(f"--set #{i}", text) for i, text in enumerate(a.set, start=1)]
    flags += [("--dtype", f"Model.dtype={a.dtype!r}")] if a.dtype else []
    flags += [("--seed", f"Run.seed={a.seed}")] if a.seed is not None else []
    found: dict[str, Binding] = {}
    for place, text in flags:
        found |= gin.read_flag(text, place)
    for key, binding in found.items():
        if key not in SETTABLE:
            raise ConfigError(
                f"{binding.place}: {key} means nothing to a server; expected one of "
                f"{', '.join(SETTABLE)}{nearest(key, SETTABLE)}"
            )
    return found


def _serve(a: argparse.Namespace) -> int:
    least = {"window": 2, "slots": 1, "queue": 1, "follow": 0.1}
    for name, lowest in least.items():
        if (value := getattr(a, name)) is not None and value < lowest:
            raise UserError(f"--{name} {value}: expected {lowest} or more")
    settings = _settings(a)
    try:
        from aspo_jax.serving.hosting import Hosting, Room, Settings, host
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("starlette", "uvicorn"):
            raise
        raise UserError(
            f"serving needs {error.name}, which is not installed: pip install 'aspo_jax[serve]'"
        ) from error
    hosting = Hosting(
        models=a.models,
        names=a.name,
        settings=settings,
        room=Room(a.window, a.slots, a.cache_tokens, a.queue),
        is_raw=a.logprobs_mode == "raw",
        follows=a.follow,
        routes=Settings(api_key=a.api_key, is_admin=a.admin, most_sequences=a.queue),
        host=a.host,
        port=a.port,
        drain=a.drain,
        shows_requests=a.verbose,
    )
    host(hosting, Console())
    return 0


if __name__ == "__main__":
    sys.exit(main())
