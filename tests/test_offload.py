"""`Optim.offload`: moments in the host's memory change no bit of a run, and no chip holds them."""

from __future__ import annotations

import functools
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy

from aspo_jax.config import Config, read_config
from aspo_jax.learner import Goal, Learner, PlacementError
from aspo_jax.losses import aspo, token_mean
from aspo_jax.model import Lora
from aspo_jax.model.sharding import HOST, is_on_host
from aspo_jax.optimizers import Offloaded, adamw, clipped, muon
from aspo_jax.parts import FACTORIES, build_optimizer
from aspo_jax.plan import Plan, gib, plan, report
from aspo_jax.planning.budget import FETCHED, OPTIMIZER, shard_bytes
from aspo_jax.planning.programs import UPDATE
from aspo_jax.planning.topology import GIB, parse_topology
from aspo_jax.run.checkpoint import Checkpoints
from aspo_jax.structs import TrainState

MODEL = toy.toy_model(layers=1)
GOAL = Goal(aspo(), token_mean)
ADAMW = clipped(adamw(lambda step: 0.01, MODEL.axes()), 1.0)
SIZES = {"one device": (1, 1, 1), "four devices": (2, 2, 1)}


@functools.cache
def learners(devices: str) -> tuple[Learner, Learner]:
    """Without and with the moments in the host's memory."""
    mesh = toy.toy_mesh(*SIZES[devices])
    plain, offloaded = (
        toy.toy_learner(MODEL, GOAL, each, mesh) for each in (ADAMW, Offloaded(*ADAMW))
    )
    return plain, offloaded


def minibatches(learner: Learner) -> list:
    """Good ones between one that is empty and one whose gradient is not finite."""
    made = toy.examples()
    broken = [example._replace(advantage=np.nan) for example in made]
    params = toy.random_params(MODEL)
    return [
        toy.with_old(learner, params, toy.minibatch(each, 2, 8, 32))
        for each in (made, [], made[:4], broken, made)
    ]


def start(learner: Learner, devices: str) -> TrainState:
    mesh = toy.toy_mesh(*SIZES[devices])
    return learner.init(toy.on(mesh, MODEL, toy.random_params(MODEL)))


def moments(state: TrainState) -> list:
    """What of the optimizer's state is shaped as a parameter is."""
    shapes = {x.shape for x in jax.tree.leaves(state.params)}
    return [x for x in jax.tree.leaves(state.opt_state) if x.shape in shapes]


def on_host(tree) -> list:
    return [x for x in jax.tree.leaves(tree) if is_on_host(x)]


def assert_offloaded(state: TrainState) -> None:
    """The moments are in the host's memory, and nothing else is."""
    assert {x.sharding.memory_kind for x in moments(state)} == {HOST}
    assert len(on_host(state)) == len(moments(state))


# --- an update --------------------------------------------------------------------------------


@pytest.mark.parametrize("devices", SIZES)
def test_every_bit_of_a_run_is_the_same(devices):
    plain, offloaded = learners(devices)
    state, moved = start(plain, devices), start(offloaded, devices)
    assert_offloaded(moved)
    before = toy.bits(moved)
    for index, part in enumerate(minibatches(plain)):
        state, figures = plain.step(state, part)
        moved, own = offloaded.step(moved, part)
        assert toy.bits(moved) == toy.bits(state) and toy.bits(own) == toy.bits(figures)
        assert_offloaded(moved)
        assert not on_host(state)
        assert (toy.bits(moved) == before) == (index in (1, 3))  # empty, and not finite
        before = toy.bits(moved)


def test_the_moments_of_adapters_are_moved_too():
    lora = Lora(rank=2, alpha=4.0)
    optimizer = Offloaded(*optax.adam(0.1))
    state = toy.toy_learner(MODEL, GOAL, optimizer, lora=lora).state
    assert_offloaded(state)
    assert len(moments(state)) == 2 * len(jax.tree.leaves(state.params))


def test_so_are_those_of_an_optimizer_that_keeps_other_arrays_too():
    """Muon's coefficients are no parameter's."""
    optimizer = Offloaded(*clipped(muon(lambda step: 0.01, MODEL.axes()), 1.0))
    state = toy.toy_learner(MODEL, GOAL, optimizer).state
    assert_offloaded(state)
    assert any(x.ndim and not is_on_host(x) for x in jax.tree.leaves(state.opt_state))


def test_an_optimizer_without_moments_is_refused():
    with pytest.raises(PlacementError, match="Optim.offload: the optimizer keeps no array that is"):
        toy.toy_learner(MODEL, GOAL, Offloaded(*clipped(optax.sgd(0.1), 1.0)))


# --- checkpoints ------------------------------------------------------------------------------


@pytest.mark.parametrize("is_first", [False, True], ids=["to the host", "from the host"])
def test_a_checkpoint_of_one_is_resumed_by_the_other(tmp_path: Path, is_first):
    """Bit for bit, in the memory of the run that goes on."""
    pair = learners("four devices")
    writer, reader = pair[::-1] if is_first else pair
    part, *_ = minibatches(writer)
    state, _ = writer.step(start(writer, "four devices"), part)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, state, {})
        restored = checkpoints.restore(reader.state)
    assert restored is not None and toy.bits(restored.state) == toy.bits(state)
    assert on_host(restored.state) == [] if is_first else moments(restored.state)
    (state, _), (other, _) = writer.step(state, part), reader.step(restored.state, part)
    assert toy.bits(other) == toy.bits(state)


@pytest.mark.parametrize("memory", [None, HOST])
def test_an_update_waits_for_a_save_that_reads_the_hosts_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory
):
    """As on an accelerator, whose own arrays a save copies first."""
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind=memory)
    state = {"m": jax.device_put(jnp.arange(8.0), sharding)}
    may_end, calls = threading.Event(), []

    def guard() -> None:
        """Holds the background half of the save up."""
        calls.append(threading.current_thread())
        if calls[-1] is not threading.main_thread():
            assert may_end.wait(60)

    with Checkpoints(tmp_path, keep=1, guard=guard) as checkpoints:
        checkpoints.save(1, state, {})
        waiting = threading.Thread(target=checkpoints.let_go)
        waiting.start()
        waiting.join(0.5)
        assert waiting.is_alive() == (memory == HOST)
        may_end.set()
        waiting.join(60)
        assert not waiting.is_alive()


# --- the config and its plan ------------------------------------------------------------------


def config_of(*settings: str, config: str) -> Config:
    words = [word for setting in settings for word in ("--set", setting)]
    return read_config(["--config", config, *words], FACTORIES)


def test_the_setting_makes_an_optimizer_that_is_offloaded():
    for is_offloaded in (False, True):
        config = config_of(f"Optim.offload={is_offloaded}", config="countdown_cpu")
        optimizer, _ = build_optimizer(config, MODEL.axes())
        assert isinstance(optimizer, Offloaded) == is_offloaded


def estimated(name: str, *settings: str, config: str = "aspo_math_1p5b") -> Plan:
    """By formula alone: what has no room at all is not even lowered."""
    found = parse_topology(name)
    small = found._replace(chip=found.chip._replace(memory=1))
    return plan(config_of(*settings, config=config), small, lower_only=True)


def test_a_plan_counts_them_as_the_hosts():
    """On each chip less by the moments, whose bytes a line of their own gives."""
    found, before = (estimated("v5e:4x4", f"Optim.offload={value}") for value in (True, False))
    parts, more = ({p.name: p.bytes for p in each.rows[0].parts} for each in (found, before))
    moved = 2 * shard_bytes(found.programs.state.params)
    assert more[OPTIMIZER] == pytest.approx(moved, rel=1e-3) and parts.get(OPTIMIZER, 0) < 100
    for row, other in zip(found.rows, before.rows, strict=True):
        assert other.needed - row.needed == pytest.approx(moved)
    line = f"host memory: optimizer state {gib(moved)} GiB per chip, {gib(4 * moved)} per host; "
    assert moved > GIB / 2 and line in report(found) and "host memory" not in report(before)
    assert "Optim.offload" in next(p.remedy for p in before.rows[0].parts if p.name == OPTIMIZER)


def test_an_update_has_room_for_what_it_fetches():
    """Of short rows little is kept for the backward pass, and then the moments come."""
    short = "Train.row_tokens=256", "Sampler.max_prompt_tokens=128"
    found = estimated("v5e:4x4", "Optim.offload=True", *short, "Sampler.max_response_tokens=128")
    (update, score, *_), moved = found.rows, 2 * shard_bytes(found.programs.state.params)
    parts = {p.name: p.bytes for p in update.parts}
    meanwhile = parts["gradients, float32"]
    held = sum(part.bytes for part in update.budget.held)
    assert 0 < parts[FETCHED] < moved
    assert update.needed == pytest.approx(held + meanwhile + moved)
    assert FETCHED not in {p.name for p in score.parts}


def test_a_tpu_fetches_them_in_a_loop_of_their_own():
    """Which its compiler cannot begin before the gradient is there; it would, with all else."""
    found = estimated("v5e:1x1", "Optim.offload=True", config="countdown_cpu").programs
    lines = found.by_name[UPDATE].lower("tpu").as_text().splitlines()
    loops = [i for i, line in enumerate(lines) if "stablehlo.while" in line]
    fetched = [i for i, line in enumerate(lines) if '_xla_buffer_placement = "device"' in line]
    assert len(fetched) == len(jax.tree.leaves(found.state.opt_state))
    (own,) = {max(i for i in loops if i < fetch) for fetch in fetched}
    indents = [len(line) - len(line.lstrip()) for line in lines]
    assert all(indents[i] > indents[own] for i in fetched)
    assert not any(own < i < fetched[-1] for i in loops)


def test_a_plan_says_where_it_saves_nothing_or_cannot_be_seen():
    on_cpu, on_gpu = (estimated(name, "Optim.offload=True") for name in ("cpu:16", "h100:8"))
    assert "note: Optim.offload saves nothing on a CPU" in report(on_cpu)
    assert "host memory: " not in report(on_cpu)
    assert "note: no GPU has tried Optim.offload" in report(on_gpu)
    parts = {p.name: p.bytes for p in on_cpu.rows[0].parts}
    assert parts[OPTIMIZER] == shard_bytes(on_cpu.programs.state.opt_state)
