"""Advice: the fastest settings that fit, as lines to paste."""

from __future__ import annotations

import dataclasses

import pytest

from aspo_jax import plan as planning
from aspo_jax.errors import UserError
from aspo_jax.library import configure
from aspo_jax.model.sharding import abstract_mesh
from aspo_jax.plan import advise
from aspo_jax.planning import advice
from aspo_jax.planning.advice import Half, Search, changed, exchanged
from aspo_jax.planning.budget import chip_tokens
from aspo_jax.planning.flops import layer_weights
from aspo_jax.planning.programs import DECODE, SCORE, UPDATE, Programs, programs, read_shape
from aspo_jax.planning.topology import Topology, parse_topology


@pytest.fixture(autouse=True)
def coarse(monkeypatch):
    monkeypatch.setattr(advice, "ROWS", (1, 4))
    monkeypatch.setattr(advice, "CHUNKS", (512, 1024))


def _with_memory(name: str, gib: float) -> Topology:
    found = parse_topology(name)
    return found._replace(chip=found.chip._replace(memory=int(gib * 2**30)))


def _search(topology: Topology) -> Search:
    config = configure("own_data")
    return Search(config, read_shape(config).config, topology)


def test_the_best_is_the_fastest_that_fits():
    search = _search(parse_topology("v6e:2x2"))
    best = next(iter(search))
    left = [halves for halves in search._halves.values() if all(halves)]
    fastest = [sum(min(h.seconds for h in half) for half in halves) for halves in left]
    assert best.seconds == min(fastest)
    assert all(h.needed <= 31.24 * 2**30 for halves in left for half in halves for h in half)
    assert search.tried > sum(len(half) for halves in left for half in halves)
    assert best.settings["Train.head_chunk"] == 1024  # as fast as 512, in fewer pieces
    mesh = [best.settings[f"Runtime.{axis}"] for axis in ("data", "fsdp", "tensor")]
    assert mesh == [1, 4, 1] and best.settings["Model.remat"] == "dots"


def test_with_less_memory_less_is_kept_and_then_matrices_are_split():
    best = [next(iter(_search(_with_memory("v6e:2x2", gib)))) for gib in (31, 4, 2.5)]
    assert [it.settings["Model.remat"] for it in best] == ["dots", "attention", "full"]
    assert [it.settings["Runtime.tensor"] for it in best] == [1, 1, 2]
    assert best[0].seconds < best[1].seconds < best[2].seconds


@pytest.mark.parametrize(("program", "times"), [(UPDATE, 1.2), (DECODE, 1.01)])
def test_what_did_not_fit_and_what_would_not_either_is_left_out(program, times):
    search = _search(parse_topology("v6e:1x1"))
    before = next(iter(search))

    def half(of) -> Half:
        return of.training if program == UPDATE else of.sampling

    search.refuse(before, program, times * 31.24 * 2**30)  # of what is there
    after = next(iter(search))
    assert half(after).needed < half(before).needed / times and after.seconds >= before.seconds


def _programs(data: int, fsdp: int, tensor: int) -> Programs:
    config = changed(configure("own_data"), {"Train.rows_per_microbatch": 4})
    sizes = (data, fsdp, tensor)
    own = abstract_mesh((data * fsdp, 1, tensor))
    return programs(config, read_shape(config).config, abstract_mesh(sizes), own, "tpu")


def test_what_chips_exchange():
    of = _programs(1, 4, 1)
    count = layer_weights(of.shape) + of.shape.vocab_size * of.shape.hidden_size
    micro = of.batch.microbatches
    # Three quarters lie elsewhere: in bfloat16 there and back, and gradients in float32.
    assert exchanged(of, UPDATE) == (pytest.approx(micro * 0.75 * count * (2 * 2 + 4)), 0, 0)
    assert exchanged(of, SCORE) == (pytest.approx(micro * 0.75 * count * 2), 0, 0)
    assert exchanged(of, DECODE) == (0, 0, 0)
    # Copies add up their gradients: each sends and gets them once.
    assert exchanged(_programs(4, 1, 1), UPDATE)[0] == pytest.approx(micro * 0.75 * count * 4 * 2)


def test_what_a_tensor_axis_exchanges():
    of = _programs(1, 1, 2)
    gathered, reduced, collectives = exchanged(of, SCORE)
    sums = 2 * of.shape.layers * of.batch.microbatches
    hidden = chip_tokens(of) * of.shape.hidden_size * 2
    assert (gathered, collectives) == (0, sums)
    assert reduced == pytest.approx(sums * hidden)  # twice, and half of it lies elsewhere


def test_advice_is_lines_of_a_config(capsys):
    words = ["--config", "own_data", "--topology", "v6e:1x1", "--lower-only", "--advise"]
    assert planning.main(words) == 0
    printed = capsys.readouterr().out
    lines = printed[printed.index("# The fastest of ") :].splitlines()
    assert "They may fit." in lines[0]
    best = advise(configure("own_data"), "v6e:1x1", lower_only=True).best
    assert configure("own_data", *lines[1:]) == changed(
        configure("own_data", *lines[1:]), best.settings
    )
    assert len(lines) == 1 + len(best.settings)


def test_settings_that_do_not_fit_after_all_are_followed_by_smaller_ones(monkeypatch):
    """Compiled, an update needs more than the formula says: here half again."""
    tried = []

    def lowered(of, row):
        tried.append(of.config.model.remat)
        own = 1.5 * row.budget.least * (row.program == UPDATE)
        return dataclasses.replace(row, state="compiled", own=own)

    monkeypatch.setattr(planning, "_lowered", lowered)
    needed = next(iter(_search(parse_topology("v6e:1x1")))).training.needed
    found = advise(
        configure("own_data"), _with_memory("v6e:1x1", 1.05 * needed / 2**30), lower_only=True
    )
    assert found.plan.fits and tried[0] == "dots" and found.best.training.needed < needed / 1.1


def test_without_a_known_speed_there_is_no_advice():
    with pytest.raises(UserError, match="no speed is known of cpu:4"):
        advise(configure("own_data"), "cpu:4", lower_only=True)


def test_nothing_fits():
    with pytest.raises(UserError, match=r"none of \d+ settings fits v6e:1x1 by formula; take more"):
        advise(configure("own_data"), _with_memory("v6e:1x1", 1), lower_only=True)
