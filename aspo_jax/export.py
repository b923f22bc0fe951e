"""A checkpoint as a model folder: ``python -m aspo_jax.export CHECKPOINT OUT``."""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from aspo_jax.config import Config
from aspo_jax.data import copy_tokenizer, load_tokenizer
from aspo_jax.errors import CommandParser, UserError, run_command
from aspo_jax.model import build_model, read_model_config, save_model
from aspo_jax.model.sharding import MESH_AXES, device_mesh
from aspo_jax.origin import locate
from aspo_jax.parts import FACTORIES
from aspo_jax.paths import path_argument
from aspo_jax.policy import load_policy, parameter_count, stop_ids
from aspo_jax.rounding import rounding_cost
from aspo_jax.run.folder import CONFIG, INITIAL_MODEL
from aspo_jax.run.records import find_run, run_config, trained_weights

QUICK = 200_000_000  # parameters that a CPU answers a few prompts with in a minute or two


class ExportError(UserError):
    """The model that the run started from is not there, or the target is taken."""


def main(argv: Sequence[str] | None = None) -> int:
    """Export what the command line names; returns the exit status."""
    parser = CommandParser(
        "export",
        "Write the weights of a checkpoint as a folder that transformers loads. "
        "Runs on the CPU, also beside a training run; holds the weights in memory, no optimizer.",
    )
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        type=path_argument,
        help="a run folder or its checkpoints folder (newest complete step), or one step's folder",
    )
    parser.add_argument(
        "out", metavar="OUT", type=path_argument, help="folder to write; new or empty"
    )
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32"), help="type of the weights (Run.export_dtype)"
    )
    parser.add_argument(
        "--measure",
        action="store_true",
        help="say what a smaller type costs, however long a large model takes on the CPU",
    )
    a = parser.parse_args(argv)
    jax.config.update("jax_platforms", "cpu")  # the accelerator may be busy with the very run

    def command() -> int:
        step, cost = export(a.checkpoint, a.out, a.dtype, is_patient=a.measure)
        print(f"{a.out}: the model after {step} iterations")
        if cost:
            print(cost)
        return 0

    return run_command(command)


class Exported(NamedTuple):
    """The step whose weights were written, and a sentence on what their type costs, if it does."""

    step: int
    cost: str | None


def export(
    checkpoint: Path, out: Path, dtype: str | None = None, *, is_patient: bool = False
) -> Exported:
    """Write the weights of a checkpoint as a Hugging Face folder.

    Config, generation settings and tokenizer are those of the model that the run started from.

    Args:
        checkpoint: a run folder, its ``checkpoints`` folder, or one step in there.
        out: new or empty folder.
        dtype: "bfloat16" or "float32"; None: the run's ``Run.export_dtype``.
        is_patient: measure what the type costs of a large model too.

    Raises:
        NoRun: not a run's folder or checkpoint.
        ExportError: ``out`` is taken.
        CheckpointError: no step is complete, or it is damaged or does not fit the run's model.
        ConfigError, DataError, ModelFolderError: the run's config or initial model cannot be read.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ExportError(f"{out} exists and is not an empty folder; choose another OUT")
    saved = find_run(checkpoint)
    config = locate(run_config(saved.run, FACTORIES), saved.run)
    source = _initial_model(config, saved.run)
    shape, tokenizer = read_model_config(source), load_tokenizer(source)
    dtype = dtype or config.run.export_dtype
    weights = jax.eval_shape(build_model(shape).init, jax.random.key(0))
    count = parameter_count(weights)
    is_measured = dtype != "float32" and (is_patient or count <= QUICK)
    # Half the memory where nothing is measured.
    read_as = jnp.dtype("float32" if is_measured else dtype)
    here = SingleDeviceSharding(jax.devices("cpu")[0])
    wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, read_as, sharding=here), weights)
    step, params = trained_weights(saved, config, wanted)
    save_model(
        out,
        params,
        shape,
        functools.partial(copy_tokenizer, source),
        eos_token_id=stop_ids(config, tokenizer, source),
        source=source,
        dtype=dtype,
    )
    if is_measured:
        return Exported(step, _cost(config, source, params, dtype))
    reason = f"{count:,} parameters take long on a CPU, --measure takes them"
    return Exported(step, None if dtype == "float32" else _not_measured(dtype, reason))


def _not_measured(dtype: str, reason: object) -> str:
    return f"export in {dtype}: what it costs was not measured ({reason})"


def _cost(config: Config, source: Path, params: Any, dtype: str) -> str:
    """What the type costs, or why that cannot be said."""
    # The run's own kernels may be those of an accelerator.
    here = dataclasses.replace(config, model=dataclasses.replace(config.model, attention="auto"))
    mesh = device_mesh(jax.devices("cpu")[:1], (1,) * len(MESH_AXES))
    try:
        policy = load_policy(here, source, mesh)
        return rounding_cost(here, policy, params, dtype).line(dtype)
    except UserError as error:
        return _not_measured(dtype, error)


def _initial_model(config: Config, run: Path) -> Path:
    if config.model_folder is None:
        return run / INITIAL_MODEL
    source = Path(config.model_folder).expanduser()
    if not source.is_dir():
        raise ExportError(
            f"{run / CONFIG}: Model.path = {config.model.path!r} is not there, expected the folder "
            "that the run started from (its tokenizer and config.json), or a name of the hub; a "
            "relative path is looked up from here"
        )
    return source


if __name__ == "__main__":
    sys.exit(main())
