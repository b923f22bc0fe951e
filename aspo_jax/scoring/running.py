"""An evaluation by command: check, claim a folder, sample in chunks, report."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import math
import platform
import re
import time
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jax.sharding import Mesh

from aspo_jax import runtime
from aspo_jax.config import Config
from aspo_jax.config.reading import changed_config
from aspo_jax.config.suites import ENGINE, Suite
from aspo_jax.evaluation import answers, set_collectors
from aspo_jax.loading import (
    Named,
    affordable_slots,
    find_model,
    fitted_sampler,
    identity,
    load_weights,
    named_config,
    rounded,
)
from aspo_jax.model.sharding import row_shards
from aspo_jax.origin import locate
from aspo_jax.parts import FACTORIES, build_peers, open_scorer
from aspo_jax.policy import Policy, load_policy
from aspo_jax.rollout import Collector
from aspo_jax.run.console import Bar, Console
from aspo_jax.sampler import EVALUATE, Choice, PagedSampler
from aspo_jax.scoring.report import read_report, table_text, write_report
from aspo_jax.scoring.results import (
    add_seconds,
    claim,
    finished_draws,
    lock_results,
    read_samples,
    rows_of,
    write_chunk,
    write_samples,
)
from aspo_jax.structs import Prompt
from aspo_jax.suites import Problems, digest_of, read_problems

# What may differ when a command goes on: where things are, and who does the work.
MOVABLE = re.compile(r"model\.path|sets\.\w+\.(source|paths)|engine\.Runtime\..*|grading\.workers")
_CHUNK = 4  # times the sequences that are sampled at once


class Plan(NamedTuple):
    """An evaluation that can begin: everything but the weights was found usable."""

    suite: Suite
    model: Named
    config: Config
    problems: Sequence[Problems]
    policy: Policy
    mesh: Mesh
    prompts: Mapping[str, Sequence[Prompt]]


def plan(model: str, step: int | None, suite: Suite, data_folder: str) -> Plan:
    """Read and check all that is small.

    Raises:
        UserError: what a person must mend, before any weights are read.
    """
    here = changed_config(suite.engine, FACTORIES).runtime
    runtime.join(here.coordinator, here.num_processes, here.process_id)
    named = find_model(model, step)
    config = named_config(named, model, suite.engine)
    problems = read_problems(suite, data_folder)
    mesh = runtime.start(**dataclasses.asdict(config.runtime))
    config = locate(config, named.saved and named.saved.run)
    policy = load_policy(config, config.model_folder, mesh)
    prompts = {each.name: each.prompts(policy.tokenizer) for each in problems}
    config = _with_slots(config, suite, policy, mesh, prompts)
    return Plan(suite, named, config, problems, policy, mesh, prompts)


def _with_slots(
    config: Config, suite: Suite, policy: Policy, mesh: Mesh, prompts: Mapping[str, Any]
) -> Config:
    """The config with as many sequences at once as there is memory and work for, unless set."""
    slots = config.sampler.slots
    if "Sampler.slots" not in suite.engine:
        tokens = _longest(prompts) + _most_tokens(suite)
        slots = affordable_slots(policy.model.config, config.model.dtype, tokens, mesh)
        samples = sum(len(prompts[name]) * s.samples for name, s in suite.sets.items())
        slots = rounded(min(slots, samples), row_shards(mesh))
    return dataclasses.replace(config, sampler=dataclasses.replace(config.sampler, slots=slots))


def _longest(prompts: Mapping[str, Sequence[Prompt]]) -> int:
    return max(len(p.tokens) for each in prompts.values() for p in each)


def _most_tokens(suite: Suite) -> int:
    return max(s.max_response_tokens for s in suite.sets.values())


def settings_of(p: Plan) -> dict[str, Any]:
    """Everything that decides the samples and their verdicts, and what made them."""
    values = p.config.bindings()
    engine = {f"{s}.{f}": values[f"{s}.{f}"] for s, names in ENGINE.items() for f in names}
    return {
        "name": p.model.name,
        "model": identity(p.model, p.config),
        "suite": p.suite.name,
        "changed": list(p.suite.changed),
        "seed": p.suite.seed,
        "sets": {
            each.name: {
                **_plain(each.settings),
                "source": each.source,
                "prompts": len(each.rows),
                "of": each.count,
                "sha256": digest_of(p.prompts[each.name]),
            }
            for each in p.problems
        },
        "engine": {k: v for k, v in engine.items() if not k.startswith(("Reward.", "Runtime.c"))},
        "grading": {k[7:]: v for k, v in engine.items() if k.startswith("Reward.")},
        "versions": versions(),
    }


def _plain(section: Any) -> dict[str, Any]:
    return {f.name: getattr(section, f.name) for f in dataclasses.fields(section)}


def versions() -> dict[str, str]:
    """Of Python and of the packages that have a say in samples and verdicts."""
    packages = ("aspo_jax", "jax", "jaxlib", "numpy", "transformers", "tokenizers", "math-verify")
    found = {"python": platform.python_version()}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


# --- sampling -------------------------------------------------------------------------------------


def run(p: Plan, out: Path, console: Console, chunk: int | None = None) -> str:
    """Sample and grade what is not yet, and write the report; returns its text.

    chunk: prompts whose samples are kept together, what a kill costs; None: enough to keep the
        sampler busy.

    Raises:
        UserError: the folder holds another evaluation, or something cannot be read or written.
    """
    with runtime.on_main(lambda: lock_results(out)) or contextlib.nullcontext():
        settings = settings_of(p)
        runtime.check_same("the evaluation", json.dumps(settings, default=str))
        runtime.on_main(lambda: claim(out, settings, MOVABLE))
        introduce(p, out, console)
        rows = read_samples(out)
        done = {name: finished_draws(rows, name, s.samples) for name, s in p.suite.sets.items()}
        del rows  # gigabytes of a large suite
        runtime.check_same("the samples in the folder", repr(done))
        left = {
            name: [x for x in asked if x.draw not in done[name]]
            for name, asked in p.prompts.items()
        }
        if any(left.values()):
            _sample(p, left, out, console, chunk)
        return runtime.on_main(lambda: conclude(out, settings)) or ""


def introduce(p: Plan, out: Path, console: Console) -> None:
    """Say what will run."""
    console.note(f"{p.model.name}  ->  {out}", "bold")
    rows = []
    for each in p.problems:
        s = each.settings
        of = f" of {each.count:,}, a part of the set" if each.is_limited else ""
        rows.append((
            each.name,
            f"{len(each.rows):,} prompts{of} x {s.samples} samples, temperature {s.temperature:g},"
            f" <= {s.max_response_tokens:,} tokens  ({each.source})",
        ))  # fmt: skip
    console.table("What will be evaluated", rows)
    shape, longest = p.policy.model.config, _longest(p.prompts) + _most_tokens(p.suite)
    console.note(f"{p.config.sampler.slots} sequences at once, {p.config.model.dtype}")
    if longest > shape.max_position:
        console.note(
            f"prompt and response may have {longest:,} tokens, but the model's config.json says "
            f"{shape.max_position:,} at most (max_position_embeddings)",
            "yellow",
        )


def conclude(out: Path, settings: Mapping[str, Any]) -> str:
    """One file of all samples, and the report."""
    order = list(settings["sets"])
    rows = sorted(read_samples(out), key=lambda r: (order.index(r["set"]), r["draw"], r["sample"]))
    write_samples(out, rows)
    return write_report(out, settings, rows)


def _sample(
    p: Plan, left: Mapping[str, list[Prompt]], out: Path, console: Console, chunk: int | None
) -> None:
    """Answer what is left, chunk by chunk."""
    kinds = frozenset(kind for each in p.problems for kind in each.kinds)
    sets, most, slots = p.suite.sets, _most_tokens(p.suite), p.config.sampler.slots
    with open_scorer(p.config, kinds) as scorer:
        sampler = fitted_sampler(
            p.config,
            p.policy,
            p.mesh,
            longest_prompt=_longest(p.prompts),
            max_tokens=most,
            slots=slots,
            samples=max(min(s.samples for s in sets.values()), slots // 8),
        )
        sampler.start(load_weights(p.model, p.config, p.policy, p.mesh))
        collector_of = set_collectors(Collector(_Ready(sampler), scorer, p.policy.decode), most)
        for name, asked in left.items():
            size = chunk or math.ceil(_CHUNK * slots / sets[name].samples)
            chunks = [asked[start : start + size] for start in range(0, len(asked), size)]
            _answer(p, name, collector_of(sets[name]), chunks, out, console)


def _answer(
    p: Plan,
    name: str,
    collector: Collector,
    chunks: Sequence[Sequence[Prompt]],
    out: Path,
    console: Console,
) -> None:
    """Answer one set and say how it went."""
    k, peers = p.suite.sets[name].samples, build_peers()
    total = len(p.prompts[name]) * k
    left = sum(map(len, chunks)) * k
    if not left:
        console.note(f"  {name}: all {total:,} samples are there")
        return
    with console.phase(name, total, "samples") as bar:
        bar.begin_at(total - left)
        for chunk in chunks:
            start = time.perf_counter()
            phase = _phase(bar, peers.count)
            rollout = answers(
                collector, None, chunk, k, seed=p.suite.seed, peers=peers, phase=phase
            )
            rows = rows_of(name, rollout, EVALUATE, p.suite.seed)
            write_chunk(out, rows, peers.index)
            seconds = time.perf_counter() - start
            runtime.on_main(lambda seconds=seconds: add_seconds(out, name, seconds))
    if runtime.is_main():
        mine = read_samples(out, name)
        right = sum(r["reason"] == "match" for r in mine)
        console.note(f"  {name}: {right:,} of {len(mine):,} samples are right")


def _phase(bar: Bar, processes: int) -> Callable[..., Any]:
    """A phase of `collect` that moves a bar of the whole set, for all processes at one pace."""

    @contextlib.contextmanager
    def phase(name: str, *_: Any) -> Iterator[Any]:
        def advance(tokens: int = 0) -> None:
            bar.advance(processes, tokens=tokens * processes)

        yield types.SimpleNamespace(advance=advance)

    return phase


class _Ready:
    """A sampler that has its weights already and keeps them: no second copy is needed."""

    def __init__(self, sampler: PagedSampler):
        self._sampler = sampler

    def start(self, params: Any) -> None:
        """Nothing to do."""

    def release(self) -> None:
        """Nothing to do."""

    def drawing(self, temperature: float, choice: Choice) -> _Ready:
        other = self._sampler.drawing(temperature, choice)
        other.params = self._sampler.params
        return _Ready(other)

    def sample(self, requests: Any) -> Any:
        return self._sampler.sample(requests)


def show(out: Path, console: Console) -> None:
    """The figures, on the terminal."""
    report = read_report(out)
    console.table("What was found (percent)", table_text(report))
    console.table("Where things are", [(n, str(out / n)) for n in ("report.md", "report.json")])
