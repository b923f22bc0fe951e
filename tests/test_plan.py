"""The plan: verdicts with and without a compiler, its table, and what it refuses."""

from __future__ import annotations

import importlib.util
import json
import math
import re

import jax
import pytest

from aspo_jax import plan as planning
from aspo_jax.config import Config, ConfigError, read_config
from aspo_jax.config.reading import config_folder
from aspo_jax.model import ModelConfig, build_model, read_model_config
from aspo_jax.model.sharding import MeshError
from aspo_jax.parts import FACTORIES
from aspo_jax.plan import HEADROOM, Plan, parse_exhausted, plan, report
from aspo_jax.planning import topology as topologies
from aspo_jax.planning.budget import (
    ADAPTER,
    CACHE,
    FROZEN,
    OPTIMIZER,
    PROCESS,
    PROCESS_BYTES,
    PUBLISHED,
    REFERENCE,
    TEACHER,
    WEIGHTS,
    shard_bytes,
)
from aspo_jax.planning.flops import causal_pairs, forward_flops
from aspo_jax.planning.hlo import flat, parse, steps
from aspo_jax.planning.programs import DECODE, PREFILL, SCORE, UPDATE
from aspo_jax.planning.topology import GIB, TopologyError, open_devices, parse_topology


def _read(*flags: str, config: str = "countdown_cpu") -> Config:
    words = [word for flag in flags for word in ("--set", flag)]
    return read_config(["--config", config, *words], FACTORIES)


@pytest.fixture(scope="module")
def tiny() -> Plan:
    """The embedded run with a KL penalty on four simulated devices, compiled."""
    return plan(_read("Objective.penalties=['kl_penalty']", "Runtime.fsdp=2"), "cpu:4")


# --- compiled ---------------------------------------------------------------------------------


def test_every_program_is_compiled_and_fits(tiny):
    assert [row.program for row in tiny.rows] == [UPDATE, SCORE, PREFILL, DECODE]
    assert all(row.state == "compiled" and row.memory for row in tiny.rows)
    assert tiny.fits and tiny.is_certain and tiny.verdict.startswith("fits: ")
    assert dict(tiny.programs.mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 1}
    assert tiny.programs.hosts == 1


def test_arguments_are_what_the_parts_say(tiny):
    """The formula's parts against the compiler's own count of the arguments."""
    update, score, _, decode = tiny.rows
    sizes = {part.name: part.bytes for row in tiny.rows for part in row.parts}
    assert "weights for sampling" not in {part.name for part in (*update.parts, *score.parts)}
    state = sizes["weights, float32"] + sizes["optimizer state"]
    rows = sizes["rows of the mini-batches"]
    assert update.memory.arguments == pytest.approx(state + rows / 4, rel=0.02)
    policies = sizes["weights, float32"] + sizes["reference policy, bfloat16"]
    assert score.memory.arguments == pytest.approx(policies + rows / 4 * 9 / 12, rel=0.04)
    sampling = sizes["weights for sampling"] + sizes["key-value cache"]
    assert decode.memory.arguments == pytest.approx(sampling, rel=0.02)


def test_what_lies_beside_a_program_is_added(tiny):
    update, score, _, decode = tiny.rows
    sizes = {part.name: part.bytes for row in tiny.rows for part in row.parts}
    assert update.budget.beside >= sizes["reference policy, bfloat16"]
    assert score.budget.beside >= sizes["optimizer state"]
    assert decode.budget.beside >= sizes["optimizer state"] + sizes["reference policy, bfloat16"]
    for row in tiny.rows:
        assert row.needed >= row.memory.peak + row.budget.beside - 1
        assert sum(part.bytes for part in row.parts) == pytest.approx(row.needed)


def test_decoding_copies_no_cache_and_multiplies_as_often_as_the_formula_says(tiny):
    """Read from what was compiled: one token of every row, and all reads of a full one."""
    of, (*_, decode) = tiny.programs, tiny.rows
    text = of.by_name[DECODE].lower().compile().as_text()
    reads = math.ceil(of.limits.row_pages / max(of.limits.read // of.limits.page, 1))
    found = list(flat(steps(parse(text), (1, reads))))
    pool = shard_bytes(of.cache.key_EKYXSC)
    assert max(item.written for item in found) < pool / 2
    flops = sum(item.times * item.flops for item in found)
    assert flops == pytest.approx(decode.budget.work.flops, rel=0.1)


def test_calls_of_an_iteration(tiny):
    # 32 prompts x 16 samples in 512 slots; 4 mini-batches x 2 epochs; 24 positions. A CPU reads
    # 256 tokens of prompts at once: 2 prompts of a page of 24 on each of 4 devices.
    assert [row.budget.work.calls for row in tiny.rows] == [8, 4, 4, 24]


def test_adapters_are_small_and_the_frozen_weights_are_there_once():
    """With a reference policy, which is the frozen weights."""
    lora = ("Lora.rank=2", "Lora.weights='bfloat16'")
    reference = "Objective.penalties=['kl_penalty']"
    found, full = (
        plan(_read(*flags, reference, "Runtime.fsdp=2"), "cpu:4", lower_only=True)
        for flags in (lora, [])
    )
    of = found.programs
    parts = {part.name: part.bytes for row in found.rows for part in row.parts}
    before = {part.name: part.bytes for row in full.rows for part in row.parts}
    assert REFERENCE not in parts and WEIGHTS not in parts and before[REFERENCE]
    assert parts[FROZEN] == shard_bytes(of.frozen) == before[REFERENCE]  # bfloat16 both
    assert parts[ADAPTER] == shard_bytes(of.state.params) < parts[FROZEN] / 2
    assert parts[OPTIMIZER] == pytest.approx(2 * parts[ADAPTER], rel=0.01)
    assert parts["gradients, float32"] == parts[ADAPTER]
    rows = parts["rows of the mini-batches"] / of.batch.minibatches
    for name, more in ((UPDATE, parts[OPTIMIZER]), (SCORE, 0)):
        given = shard_bytes(of.by_name[name].arguments)
        assert given == pytest.approx(parts[ADAPTER] + parts[FROZEN] + more + rows, rel=0.1)
    (update, score), (full_update, full_score) = found.rows[:2], full.rows[:2]
    assert update.budget.beside < full_update.budget.beside  # nor is there a second copy beside it
    assert 0.6 < update.budget.work.flops / full_update.budget.work.flops < 0.9
    assert 1 < score.budget.work.flops / full_score.budget.work.flops < 1.3


def test_without_merging_one_chip_holds_the_frozen_weights_once():
    lora = ("Lora.rank=2", "Model.dtype='bfloat16'")
    merged, unmerged = (
        plan(_read(*lora, f"Lora.is_merged={is_merged}"), "h100:1", lower_only=True)
        for is_merged in (True, False)
    )
    of = unmerged.programs
    assert of.shares_weights and not merged.programs.shares_weights
    (_, _, *sampling), (_, _, *before) = unmerged.rows, merged.rows
    for row, other in zip(sampling, before, strict=True):
        parts, copied = ({p.name: p.bytes for p in x.parts} for x in (row, other))
        assert PUBLISHED not in parts and copied[PUBLISHED] > 0.9 * parts[FROZEN]
        assert row.needed < other.needed - 0.9 * parts[FROZEN]
        given = shard_bytes(of.by_name[row.program].arguments[0])
        assert given == pytest.approx(parts[FROZEN] + parts[ADAPTER] / 2, rel=0.05)


@pytest.mark.parametrize(
    "topology, flags, is_stacked, is_in_place",
    [
        ("v5e:1x1", (), True, False),
        ("h100:1", (), False, True),
        ("h100:1", ("Sampler.paged_kernel=False",), False, False),
        ("h100:1", ("Lora.rank=2",), False, True),
        ("h100:1", ("Lora.rank=2", "Lora.is_merged=False"), True, True),
        ("cpu:1", (), False, False),
    ],
)
def test_the_layout_of_the_sampler_is_that_of_its_platform(
    topology, flags, is_stacked, is_in_place
):
    """A layer is sliced out of a stack on a TPU alone, or where the stack is the trainer's own."""
    of = plan(_read("Model.hidden_size=64", *flags), topology, lower_only=True).programs
    assert isinstance(of.weights["layers"], dict) == is_stacked
    decode = of.by_name[DECODE].lower(of.platform).as_text()
    assert ("paged_attention" in decode) == is_in_place


def test_int8_weights_are_counted_as_they_lie():
    """A byte a weight of the layers, four an output; by the sampler too, without a copy."""
    settings = ("Lora.rank=2", "Model.dtype='bfloat16'", "Lora.is_merged=False")
    found, wide = (
        plan(_read(*settings, f"Lora.weights={kind!r}"), "h100:1", lower_only=True)
        for kind in ("int8", "bfloat16")
    )
    of, (parts, before) = (
        found.programs,
        ({p.name: p.bytes for row in each.rows for p in row.parts} for each in (found, wide)),
    )
    layers = [x for x in of.frozen["layers"].values() if "kernel" in x]
    weights, outputs = (sum(x[part].size for x in layers) for part in ("kernel", "step"))
    assert parts[FROZEN] == before[FROZEN] - weights + 4 * outputs
    assert of.shares_weights and PUBLISHED not in parts
    for name in (UPDATE, SCORE, PREFILL, DECODE):
        given, other = (
            shard_bytes(each.programs.by_name[name].arguments) for each in (found, wide)
        )
        assert given == other - weights + 4 * outputs
    for row, other in zip(found.rows, wide.rows, strict=True):
        assert row.budget.work.traffic < other.budget.work.traffic


def test_a_teacher_is_held_and_scores(tmp_path):
    """A wider one than the policy, with a larger vocabulary."""
    raw = json.loads((config_folder() / "shapes" / "Qwen2.5-0.5B.json").read_text())
    raw |= {"vocab_size": 3000, "hidden_size": 128, "num_attention_heads": 4}
    raw |= {"num_hidden_layers": 5, "intermediate_size": 256}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    teacher, distil = f"Teacher.path='{tmp_path}'", "Objective.penalties=['distill']"
    found, alone = (
        plan(_read(*flags, "Runtime.fsdp=2"), "cpu:4", lower_only=True)
        for flags in ([teacher, distil], [])
    )
    params = jax.eval_shape(build_model(read_model_config(tmp_path)).init, jax.random.key(0))
    count = sum(x.size for x in jax.tree.leaves(params))
    parts = {part.name: part.bytes for row in found.rows for part in row.parts}
    assert parts[TEACHER] == pytest.approx(2 * count / 2, rel=0.02)  # bfloat16, two shards
    (update, score), (_, scored_alone) = found.rows[:2], alone.rows[:2]
    assert TEACHER in score.budget.arguments and update.budget.beside >= parts[TEACHER]
    assert score.budget.work.flops > 3 * scored_alone.budget.work.flops
    assert score.budget.added[0].bytes > 50 * scored_alone.budget.added[0].bytes  # its logits
    policies = parts["weights, float32"] + parts[TEACHER] + parts["rows of the mini-batches"] / 4
    given = shard_bytes(found.programs.by_name[SCORE].arguments)
    assert given == pytest.approx(policies, rel=0.1)
    assert f"; teacher: {tmp_path / 'config.json'}" in report(found)


def test_a_teacher_that_is_not_there_is_named():
    distil = "Objective.penalties=['distill']"
    with pytest.raises(ConfigError, match="reads a teacher, and Teacher.path is None"):
        _estimated(distil)
    with pytest.raises(ConfigError, match="Teacher.path = 'nowhere': no config.json there, and no"):
        _estimated(distil, "Teacher.path='nowhere'")


def _estimated(*flags: str) -> Plan:
    return plan(_read(*flags), _with_memory(2**20))


def test_unpacked_rows_hold_one_sequence_each():
    """Of 35 tokens at most, so that four can be packed into a row of 140."""
    sizes = ("Train.row_tokens=140", "Train.rows_per_microbatch=16")
    packed, unpacked = (
        _estimated(*sizes, f"Train.pack={pack}").rows[0].budget.work for pack in (True, False)
    )
    assert unpacked.flops == pytest.approx(4 * packed.flops)
    assert unpacked.calls == packed.calls


def test_the_state_of_any_optimizer_is_counted():
    adam = _estimated().rows[0]
    sgd = _estimated("Optim.name=sgd").rows[0]
    of_adam, of_sgd = ({part.name: part.bytes for part in row.parts} for row in (adam, sgd))
    weights, moments = of_adam["weights, float32"], of_adam["optimizer state"]
    assert moments == pytest.approx(2 * weights, rel=1e-3) and of_sgd["optimizer state"] < 100
    saved = adam.budget.work.traffic - sgd.budget.work.traffic
    assert saved == pytest.approx(2 * moments, rel=1e-3)


def test_room_for_sequences_leaves_headroom(tiny):
    room = tiny.capacity
    assert room.tokens == 12 + 24
    assert room.sequences * room.bytes_per_sequence <= 4 * tiny.topology.chip.memory * (
        1 - HEADROOM
    )
    rest = 4 * tiny.topology.chip.memory * (1 - HEADROOM) - PROCESS_BYTES
    assert (room.sequences + 5) * room.bytes_per_sequence > rest * 0.99


def test_report_is_a_markdown_table(tiny):
    text = report(tiny)
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 2 + 4 and len({line.count("|") for line in table}) == 1
    assert "attention: dense" in text and text.splitlines()[-1] == tiny.verdict
    assert "Sampler.slots = 512" in text
    assert "compiler options of the update: xla_cpu_scheduler_type=" in text


def test_report_says_what_refill_may_cost(tiny):
    """Three rounds more: an iteration that samples four times. Of a CPU no speed is known."""
    assert "\nrefill: " not in report(tiny)
    found = plan(_read("Train.refill_rounds=3"), "h100:1", lower_only=True)
    lines = [line for line in report(found).splitlines() if " h " in line]
    assert [line.partition(": ")[0] for line in lines] == ["an iteration", "refill"]
    assert "where all 3 more rounds are sampled" in lines[1]
    seconds = {row.program: row.seconds * row.budget.work.calls for row in found.rows}
    total = sum(seconds.values()) + 3 * (seconds[PREFILL] + seconds[DECODE])
    assert f"refill: {total / 3600:.2f} h" in lines[1]
    on_cpu = plan(_read("Train.refill_rounds=3"), "cpu:1", lower_only=True)
    assert "refill: an iteration may sample 4 times as much" in report(on_cpu)


# --- does not fit -----------------------------------------------------------------------------


def _with_memory(size: float, name: str = "cpu:4"):
    topology = parse_topology(name)
    return topology._replace(chip=topology.chip._replace(memory=int(size)))


def test_too_much_by_formula_is_not_compiled():
    seen = []
    found = plan(_read(), _with_memory(2**20), on_row=seen.append)
    assert not found.fits and found.is_certain and seen == []
    assert {row.state for row in found.rows} == {"estimated"}
    assert found.verdict.startswith("does not fit: ") and "needs at least" in found.verdict


def test_the_first_program_that_does_not_fit_ends_the_plan(tiny):
    """Between the lower bound and what the compiled update needs."""
    config = _read("Objective.penalties=['kl_penalty']", "Runtime.fsdp=2")
    update, *others = tiny.rows
    assert update.needed > max(row.needed for row in others)
    limit = update.needed - 1000
    seen = []
    found = plan(config, _with_memory(limit), on_row=seen.append)
    assert not found.fits and found.worst.program == UPDATE
    assert found.worst.state == "compiled" and len(seen) < 4
    assert found.verdict.endswith(found.worst.parts[0].remedy)


@pytest.mark.parametrize(
    ("flags", "part", "setting"),
    [
        (["Sampler.slots=4096"], CACHE, "Sampler.slots, now 4096"),
        (
            ["Train.rows_per_microbatch=512", "Model.remat='full'", "Sampler.slots=64"],
            "kept of each layer for the backward pass",
            "lower Train.rows_per_microbatch",
        ),
        (
            ["Train.rows_per_microbatch=512"],
            "kept of each layer for the backward pass",
            "set Model.remat to 'full'",
        ),
        (["Model.hidden_size=1024"], OPTIMIZER, "Runtime.fsdp"),
    ],
)
def test_the_largest_part_names_its_setting(flags, part, setting):
    found = _estimated(*flags)
    largest = next(p for p in found.worst.parts if p.name != PROCESS)
    assert largest.name == part
    assert setting in largest.remedy and found.verdict.endswith(largest.remedy)


@pytest.mark.parametrize(
    ("message", "size"),
    [
        (
            "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total "
            "memory required for HLO temporaries (22.38G) exceeds available HBM (15.75G).",
            22.38 * GIB,
        ),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 17.05G of 15.75G hbm.",
            17.05 * GIB,
        ),
        ("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 512.0MiB.", GIB / 2),
        ("RESOURCE_EXHAUSTED: something new", 0.0),
        ("INTERNAL: a bug", None),
    ],
)
def test_exhausted_memory_is_read_from_the_message(message, size):
    assert parse_exhausted(message) == size


def _refuse(monkeypatch, message: str) -> None:
    """Have the compiler refuse the update."""

    class Refusing:
        def lower(self):
            raise planning.jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: {message}")

    real = planning.programs

    def refusing(*arguments):
        found = real(*arguments)
        return found._replace(by_name=found.by_name | {UPDATE: Refusing()})

    monkeypatch.setattr(planning, "programs", refusing)


def test_a_refusal_of_the_compiler_is_a_verdict(monkeypatch):
    _refuse(monkeypatch, "memory for HLO temporaries (22.38G) exceeds available HBM (15.75G).")
    found = plan(_read(), "cpu:4")
    row = next(row for row in found.rows if row.program == UPDATE)
    assert row.state == "refused" and row.needed > 22 * GIB and not found.fits
    assert "other temporaries" in found.verdict and "Train.row_tokens" in found.verdict


def test_a_refusal_that_names_no_size_does_not_fit_either(monkeypatch):
    _refuse(monkeypatch, "something new")
    found = plan(_read(), "cpu:4")
    assert found.worst.program == UPDATE and not found.fits and found.is_certain
    assert found.verdict.startswith("does not fit: update, refused by the compiler, needs at least")


# --- lowered only -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("topology", "hosts"), [("v5e:4x4", 4), ("v5p:2x2x2", 2), ("v4:2x2x4", 4), ("v6e:4x4", 4)]
)
def test_lowering_needs_no_compiler(topology, hosts):
    found = plan(_read(config="aspo_math_1p5b"), topology, lower_only=True)
    assert found.fits and not found.is_certain and found.verdict.startswith("may fit: ")
    assert {row.state for row in found.rows} == {"lowered"}
    assert found.programs.hosts == hosts and found.programs.attention.name == "splash"
    assert "packaged shape" in found.source
    # 1.777 B parameters: three float32 arrays of them, and two bytes each of the reference.
    sizes = {part.name: part.bytes for row in found.rows for part in row.parts}
    chips = found.topology.size
    assert sizes["optimizer state"] == pytest.approx(8 * 1.777e9 / chips, rel=2e-3)
    assert sizes["reference policy, bfloat16"] == pytest.approx(2 * 1.777e9 / chips, rel=2e-3)
    assert sizes["weights for sampling"] == pytest.approx(2 * 1.777e9, rel=2e-3)


def test_lowering_for_gpus_needs_no_plugin():
    found = plan(_read(config="aspo_math_1p5b"), "h100:8", lower_only=True)
    assert {row.state for row in found.rows} == {"lowered"}
    assert found.programs.attention.name == "pallas" and found.programs.hosts == 1


def test_command_prints_the_plan_and_its_verdict(capsys):
    argv = ["--config", "aspo_math_1p5b", "--topology", "v5e:4x4", "--lower-only"]
    assert planning.main(argv) == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines()[-1].startswith("may fit: ")
    assert "update: lowered" in printed.err
    assert planning.main([*argv, "--set", "Sampler.slots=512"]) == 1
    assert "key-value cache" in capsys.readouterr().out.splitlines()[-1]


# --- mistakes ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5:4x4", r"unknown chip 'v5' \(did you mean v5\w:4x4\?\); expected one of v4, v5e, v5p"),
        ("h1000:8", "did you mean h100:8"),
        ("tpu", "expected one of v4, v5e"),
        ("v5e:16", "the shape is '16', expected nxn for v5e, such as v5e:4x4"),
        ("v5e:32", "the shape is '32', expected nxn for v5e, such as v5e:4x8"),
        ("v5e:17", "the shape is '17', expected nxn for v5e, such as v5e:4x4"),
        ("v5e-16", r"unknown chip 'v5e-16' \(did you mean v5e:4x4\?\)"),
        ("v5litepod-32", r"\(did you mean v5e:4x8\?\)"),
        ("v6e-8", r"\(did you mean v6e:2x4\?\)"),
        ("v4-32", r"\(did you mean v4:2x2x4\?\)"),
        ("v5p-128", r"\(did you mean v5p:4x4x4\?\)"),
        ("V5E:4x4", r"\(did you mean v5e:4x4\?\)"),
        ("h100-8", r"\(did you mean h100:8\?\)"),
        ("v5e:3x5", "there is no such slice of v5e; expected one of 1x1, 2x2, 2x4, 4x4"),
        ("v6e:4x2", "there is no such slice of v6e"),
        ("v5p:2x2x3", "there is no such slice of v5p; expected one of 2x2x1, .*4x4x4 to 16x16x24"),
        ("v4:8x4x4", "there is no such slice of v4"),
        ("v4:16x16x20", "there is no such slice of v4"),
        ("h100:" + "9" * 5000, r"the shape is '9+\.\.\.'"),
        ("\0" * 200, "unknown chip"),
        ("v5p:4x4", "expected nxnxn for v5p, such as v5p:2x2x4"),
        ("h100:2x4", "expected n for h100, such as h100:8"),
        ("cpu:0", "the shape is '0'"),
        ("cpu", "the shape is ''"),
    ],
)
def test_unknown_topologies(name, message):
    with pytest.raises(TopologyError, match=message) as error:
        parse_topology(name)
    assert len(str(error.value)) < 500
    for meant in re.findall(r"(?:did you mean |such as )([^\s,?)]+)", str(error.value)):
        parse_topology(meant)


def test_slices_that_can_be_rented_are_known():
    for name in ("v5e:1x1", "v5e:16x16", "v6e:2x4", "v4:2x2x1", "v4:4x8x12", "v5p:16x16x24"):
        assert parse_topology(name).name == name


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["Runtime.fsdp=-1", "Runtime.tensor=3"], r"does not fit 8 device\(s\); set Runtime.data"),
        (["Runtime.tensor=-1"], r"Runtime.tensor = 8 does not divide the 4 device\(s\)"),
    ],
)
def test_a_mesh_that_does_not_fit(flags, message):
    with pytest.raises(MeshError, match=message):
        plan(_read("Runtime.data=1", *flags), "v5e:2x4", lower_only=True)


def test_the_devices_left_over_may_be_a_tensor_group():
    config = _read("Runtime.fsdp=1", "Runtime.tensor=-1", "Runtime.data=1", config="aspo_math_1p5b")
    found = plan(config, "cpu:2", lower_only=True)
    assert found.programs.local.shape["tensor"] == 2


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        (
            "Train.rows_per_microbatch=8",
            "Train.rows_per_microbatch = 8 cannot be shared equally by",
        ),
        ("Sampler.slots=24", "Sampler.slots = 24 cannot be shared .* set it to 16 or 32"),
        ("Model.path=models/Qwen9", "no packaged shape is named 'Qwen9'.*Qwen3-4B"),
    ],
)
def test_sizes_that_do_not_split(flag, message):
    with pytest.raises(ConfigError, match=message):
        plan(_read(flag, config="aspo_math_1p5b"), "v5e:4x4", lower_only=True)


def test_command_reports_mistakes(capsys):
    assert planning.main(["--config", "countdown_cpu", "--topology", "v5x:4x4"]) == 2
    assert capsys.readouterr().err.startswith("error: --topology v5x:4x4: unknown chip 'v5x'")


def test_arguments_that_are_none_are_answered_with_the_one_that_was_meant(capsys):
    for argv, message in (
        (["--topolgy", "cpu:4"], "required: --topology"),
        (["--topology", "cpu:4", "--lower-onyl"], "'--lower-onyl' (did you mean --lower-only?)"),
        (["--topology", "cpu:4", "Model.layers=1"], "write --set Model.layers=1"),
        (["--topology", "cpu:4", "x.gin"], "write --config x.gin"),
    ):
        with pytest.raises(SystemExit) as stop:
            planning.main(argv)
        assert stop.value.code == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ") and message in said and said.count("\n") == 1


def test_too_many_simulated_devices():
    planning.jax.devices()  # with the four of every test session
    with pytest.raises(TopologyError, match="64 simulated CPU devices are needed, found 4"):
        open_devices(parse_topology("cpu:64"))


# --- compilers that are not there -------------------------------------------------------------


def _without(monkeypatch, *names: str) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        topologies.importlib.util,
        "find_spec",
        lambda name, *rest: None if name in names else real(name, *rest),
    )


def test_without_libtpu_the_plan_is_refused_but_for_lowering(monkeypatch):
    _without(monkeypatch, "libtpu")
    monkeypatch.setattr(planning, "programs", lambda *_: pytest.fail("began to plan"))
    with pytest.raises(TopologyError, match=r"no TPU is needed, only: pip install 'jax\[tpu\]=="):
        plan(_read(), "v5e:2x2")
    monkeypatch.undo()
    _without(monkeypatch, "libtpu")
    assert plan(_read(), "v5e:2x2", lower_only=True).rows[0].state == "lowered"


def test_without_the_cuda_plugin_the_error_says_what_to_install(monkeypatch):
    _without(monkeypatch, "jax_cuda12_plugin")
    with pytest.raises(TopologyError, match="no GPU is needed.*pip install jax-cuda12-plugin=="):
        plan(_read(), "h100:8")


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs libtpu")
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5e:1x1", "v4:2x2x1"])
def test_compiles_for_tpu(topology):
    found = plan(_read("Model.dtype='bfloat16'"), topology)
    assert found.is_certain and found.fits
    assert {row.state for row in found.rows} == {"compiled"}


# --- arithmetic -------------------------------------------------------------------------------


def test_flops_by_hand():
    shape = ModelConfig(
        vocab_size=10,
        hidden_size=4,
        intermediate_size=6,
        layers=3,
        heads=2,
        kv_heads=1,
        head_dim=2,
    )
    block = 4 * 2 * (2 + 2) + 2 * 2 * 4 + 3 * 4 * 6
    pairs = causal_pairs(5)
    assert pairs == 15
    assert forward_flops(shape, 5, pairs) == 2 * (3 * block + 40) * 5 + 4 * 3 * 2 * 2 * 15
