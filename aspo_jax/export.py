"""A checkpoint as a model or adapter folder: ``python -m aspo_jax.export CHECKPOINT OUT``."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from aspo_jax.config import Config
from aspo_jax.errors import CommandParser, UserError, run_command
from aspo_jax.model import merge
from aspo_jax.model.sharding import MESH_AXES, device_mesh
from aspo_jax.origin import locate
from aspo_jax.parts import FACTORIES
from aspo_jax.paths import path_argument
from aspo_jax.policy import Policy, load_policy, parameter_count, save_policy
from aspo_jax.rounding import rounding_cost
from aspo_jax.run.folder import ADAPTER, CONFIG, INITIAL_MODEL, MODEL
from aspo_jax.run.records import Saved, find_run, run_config
from aspo_jax.weights import load_adapter_of, load_saved, save_trained_adapter

QUICK = 200_000_000  # parameters that a CPU answers a few prompts with in a minute or two
_ALONE = (1,) * len(MESH_AXES)


class ExportError(UserError):
    """The model that the run started from is not there, or the target is taken."""


def main(argv: Sequence[str] | None = None) -> int:
    """Export what the command line names; returns the exit status."""
    parser = CommandParser(
        "export",
        "Write the weights of a checkpoint as a folder that transformers loads; of a run that "
        "trained adapters (Lora.rank), one that peft loads. "
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
    parser.add_argument(
        "--merge", action="store_true", help="of a run with adapters, the whole model they make"
    )
    a = parser.parse_args(argv)
    jax.config.update("jax_platforms", "cpu")  # the accelerator may be busy with the very run

    def command() -> int:
        found = export(a.checkpoint, a.out, a.dtype, is_patient=a.measure, is_merged=a.merge)
        print(f"{a.out}: the {found.kind} after {found.step} iterations")
        for said in filter(None, (found.base, found.cost)):
            print(said)
        return 0

    return run_command(command)


class Exported(NamedTuple):
    """What was written.

    step: whose weights it has. kind: "model" or "adapter".
    cost: a sentence on what their type costs, if it does.
    base: a sentence on the frozen weights, if they are not those of their folder.
    """

    step: int
    cost: str | None = None
    kind: str = MODEL
    base: str | None = None


def export(
    checkpoint: Path,
    out: Path,
    dtype: str | None = None,
    *,
    is_patient: bool = False,
    is_merged: bool = False,
) -> Exported:
    """Write the weights of a checkpoint as a Hugging Face folder, an adapter's as one of peft's.

    Config, generation settings and tokenizer are those of the model that the run started from.

    Args:
        checkpoint: a run folder, its ``checkpoints`` folder, or one step in there.
        out: new or empty folder.
        dtype: "bfloat16" or "float32"; None: the run's ``Run.export_dtype``. Of a model; adapters
            are float32.
        is_patient: measure what the type costs of a large model too.
        is_merged: write the model that adapters and frozen weights make, not the adapter.

    Raises:
        NoRun: not a run's folder or checkpoint.
        ExportError: ``out`` is taken, ``is_merged`` and nothing to merge, or ``dtype`` of an
            adapter.
        CheckpointError: no step is complete, or it is damaged or does not fit the run's model.
        ModelChanged: adapters were trained beside another model than is there now.
        ConfigError, DataError, ModelFolderError: the run's config or initial model cannot be read.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ExportError(f"{out} exists and is not an empty folder; choose another OUT")
    saved = find_run(checkpoint)
    config = locate(run_config(saved.run, FACTORIES), saved.run)
    has_adapter = config.lora.rank is not None
    if is_merged and not has_adapter:
        raise ExportError(f"{saved.run}: --merge, and the run trained no adapter; leave it out")
    source, mesh = _initial_model(config, saved.run), device_mesh(jax.devices("cpu")[:1], _ALONE)
    policy = _policy(config, source, mesh)
    if has_adapter and not is_merged:
        return _export_adapter(saved, config, policy, mesh, out, dtype)
    return _export_model(saved, config, policy, mesh, out, dtype, is_patient)


def _policy(config: Config, source: Path, mesh: Mesh) -> Policy:
    # The run's own kernels may be those of an accelerator.
    here = dataclasses.replace(config, model=dataclasses.replace(config.model, attention="auto"))
    return load_policy(here, source, mesh)


def _export_adapter(
    saved: Saved, config: Config, policy: Policy, mesh: Mesh, out: Path, dtype: str | None
) -> Exported:
    if dtype not in (None, "float32"):
        raise ExportError(f"--dtype {dtype}: adapters are written in float32; leave it out")
    step, adapter = load_adapter_of(saved, config, policy, mesh)
    save_trained_adapter(config, policy, adapter, out)
    return Exported(step, kind=ADAPTER, base=_base(policy, ADAPTER))


_INT8 = {
    MODEL: "the matrices that were frozen are written as Lora.weights = 'int8' rounded them, since "
    "the adapter was trained beside those",
    ADAPTER: "it was trained beside matrices that Lora.weights = 'int8' rounded; beside those of "
    "the folder it answers a little otherwise (--merge writes the model that was trained)",
}


def _base(policy: Policy, kind: str) -> str | None:
    return _INT8[kind] if policy.lora is not None and policy.lora.is_int8 else None


def _export_model(
    saved: Saved,
    config: Config,
    policy: Policy,
    mesh: Mesh,
    out: Path,
    dtype: str | None,
    is_patient: bool,
) -> Exported:
    dtype = dtype or config.run.export_dtype
    count = parameter_count(jax.eval_shape(policy.model.init, jax.random.key(0)))
    is_measured = dtype != "float32" and (is_patient or count <= QUICK)
    # Half the memory where nothing is measured.
    read_as = jnp.dtype("float32" if is_measured else dtype)
    step, params = load_saved(saved, config, policy, mesh, read_as)
    params = merge(params, read_as)
    save_policy(policy, params, out, dtype)
    cost = None
    if is_measured:
        cost = _cost(config, policy, params, dtype)
    elif dtype != "float32":
        reason = f"{count:,} parameters take long on a CPU, --measure takes them"
        cost = _not_measured(dtype, reason)
    return Exported(step, cost, base=_base(policy, MODEL))


def _not_measured(dtype: str, reason: object) -> str:
    return f"export in {dtype}: what it costs was not measured ({reason})"


def _cost(config: Config, policy: Policy, params: Any, dtype: str) -> str:
    """What the type costs, or why that cannot be said."""
    try:
        return rounding_cost(config, policy, params, dtype).line(dtype)
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
