"""An external engine as a sampler, against a scripted engine with every fault that it may have."""

from __future__ import annotations

import functools
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import engine_toy
import numpy as np
import pytest
from engine_toy import FORBIDDEN, STOP_ID, VOCAB, ToyEngine, logp_V

from aspo_jax.agreement import SamplingError
from aspo_jax.engines.client import AGAIN, Counts, Engine
from aspo_jax.engines.external import ExternalSampler, group_seed
from aspo_jax.engines.fleet import Fleet, Member, Patience
from aspo_jax.engines.owned import Owned
from aspo_jax.engines.weights import Publisher
from aspo_jax.engines.wire import WIRES, Group, How
from aspo_jax.sampler import EVALUATE, LENGTH, NONFINITE, STOP, TRAIN, Choice, Drawing, Request

PROBE = (3, 4, 5, 6, 7, 8, 9)
LONGEST = 6
HOW = How(1.0, 0, 1.0, 0.0, (STOP_ID,), (), FORBIDDEN, VOCAB - 2)


@pytest.fixture
def engine() -> Iterator[ToyEngine]:
    toy = ToyEngine()
    yield toy
    toy.close()


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Any]:
    """Makes samplers on addresses, or on processes; closes them."""
    samplers = []

    def make(
        *places: ToyEngine | Owned,
        kind: str = "vllm",
        how: How = HOW,
        timeout_s: float = 20.0,
        start_s: float = 20.0,
        stops: Any = None,
    ) -> ExternalSampler:
        def member(place: ToyEngine | Owned) -> Member:
            address = place.address if isinstance(place, ToyEngine) else ""
            speaker = Engine(WIRES[kind], engine_toy.NAME, address, timeout_s=timeout_s)
            return Member(speaker, place if isinstance(place, Owned) else None)

        fleet = Fleet(list(map(member, places)), PROBE, 0.01, Patience(start_s, pause_s=0.01))
        publisher = Publisher(
            tmp_path / "weights",
            lambda params, folder: engine_toy.save(float(params["shift"]), folder),
            lambda params: np.array(engine_toy.scores(float(params["shift"]), PROBE), np.float32),
        )
        sampler = ExternalSampler(
            fleet,
            publisher,
            how,
            seed=7,
            max_prompt_tokens=4,
            max_response_tokens=LONGEST,
            at_once=4,
            stops=stops,
        )
        samplers.append(sampler)
        return sampler

    yield make
    for sampler in samplers:
        sampler.close()


def params(shift: float = 0.5) -> dict[str, np.ndarray]:
    return {"shift": np.array(shift)}


def requests(prompts: int = 3, samples: int = 2, domain: int = TRAIN) -> list[Request]:
    return [
        Request((3 + p, 4), (domain, 100 + p, 0, g)) for p in range(prompts) for g in range(samples)
    ]


def by_number(sampler: ExternalSampler, asked: list[Request]) -> list[Any]:
    found = sorted(sampler.sample(asked), key=lambda c: c.request)
    assert [c.request for c in found] == list(range(len(asked)))
    return found


def ids(completions: list[Any]) -> list[list[int]]:
    return [c.tokens_T.tolist() for c in completions]


# --- what is asked and what comes of it -----------------------------------------------------------


@pytest.mark.parametrize("kind", WIRES)
def test_completions_are_those_of_the_policy(made, kind):
    toy = ToyEngine(kind)
    sampler = made(toy, kind=kind)
    sampler.start(params(0.5))
    asked = requests()
    found = by_number(sampler, asked)
    for request, c in zip(asked, found, strict=True):
        last, expected = request.tokens[-1], []
        forbidden = () if kind == "aspo_jax" else FORBIDDEN  # that one masks them by itself
        for token in c.tokens_T.tolist():
            expected.append(logp_V(0.5, last, forbidden=forbidden)[token])
            last = token
        np.testing.assert_allclose(c.logp_T, expected, rtol=1e-6)
        assert c.logp_T.dtype == np.float32 and c.tokens_T.dtype == np.int32
        assert c.full_logp_T is None
        if kind != "aspo_jax":
            assert c.ending == (STOP if c.tokens_T[-1] == STOP_ID else LENGTH)
            assert (c.ending == STOP) or len(c.tokens_T) == LONGEST
    assert len(toy.asked) == 3, "one request for each group"
    toy.close()


def test_every_field_is_sent():
    call = WIRES["vllm"].generate("policy", Group((3, 4), 2, 6, 99), HOW)
    assert call.path == "/v1/completions"
    assert call.body == {
        "model": "policy",
        "prompt": [3, 4],
        "n": 2,
        "max_tokens": 6,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "seed": 99,
        "stop": [],
        "stop_token_ids": [STOP_ID],
        "ignore_eos": True,
        "skip_special_tokens": False,
        "logprobs": 0,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
        "logit_bias": {"0": -100.0, "1": -100.0, "14": -100.0, "15": -100.0},
    }
    own = WIRES["aspo_jax"].generate("policy", Group((3, 4), 2, 6, 99), HOW)
    assert own.body == {k: v for k, v in call.body.items() if k != "logit_bias"}
    sglang = WIRES["sglang"].generate("policy", Group((3, 4), 2, 6, 99), HOW)
    assert sglang.path == "/generate" and sglang.body["return_logprob"] is True
    assert sglang.body["sampling_params"]["top_k"] == -1
    assert sglang.body["sampling_params"]["max_new_tokens"] == 6


def test_groups_lengths_and_seeds(engine, made):
    sampler = made(engine)
    sampler.start(params())
    asked = [
        Request((3,), (TRAIN, 1, 0, 0)),
        Request((3,), (TRAIN, 1, 0, 1)),
        Request((3,), (TRAIN, 1, 0, 3)),  # its neighbour is there already
        Request((3,), (TRAIN, 1, 0, 4), max_tokens=2),
        Request((3,), (EVALUATE, 1, 0, 0), max_tokens=0),
        Request((3,), (EVALUATE, 2, 5, 0), max_tokens=99),
    ]
    found = by_number(sampler, asked)
    sent = {(body["seed"], body["n"], body["max_tokens"]) for body in engine.asked}
    first = group_seed(7, (TRAIN, 1, 0, 0))
    assert sent == {
        (first, 2, LONGEST),
        (first + 3, 1, LONGEST),
        (first + 4, 1, 2),
        (group_seed(7, (EVALUATE, 2, 5, 0)), 1, LONGEST),
    }
    assert 0 <= first < 2**31 and first == 968_860_860, "named by a stable hash"
    assert found[4].ending == LENGTH and len(found[4].tokens_T) == 0
    assert len(found[3].tokens_T) <= 2


def test_prompts_that_do_not_fit_are_refused(engine, made):
    sampler = made(engine)
    sampler.start(params())
    with pytest.raises(ValueError, match="a prompt of 5 tokens, expected 1 to 4"):
        list(sampler.sample([Request((3,) * 5, (TRAIN, 1, 0, 0))]))
    with pytest.raises(ValueError, match="draws all requests alike"):
        list(sampler.sample([Request((3,), (TRAIN, 1, 0, 0), drawing=Drawing())]))


def test_other_ways_to_draw(engine, made):
    sampler = made(engine)
    sampler.start(params())
    greedy = sampler.drawing(0.0, Choice())
    first, again = (by_number(greedy, requests(2, 2)) for _ in range(2))
    assert ids(first) == ids(again) and ids(first[:1]) == ids(first[1:2])
    assert not first[0].logp_T.any() and first[0].policy_logp_T.min() < 0
    truncated = sampler.drawing(0.5, Choice(top_k=3, top_p=0.9, min_p=0.1))
    found = by_number(truncated, requests(1, 1))
    sent = engine.asked[-1]
    assert (sent["temperature"], sent["top_k"], sent["top_p"], sent["min_p"]) == (0.5, 3, 0.9, 0.1)
    # The whole softmax is not on the wire: nobody can train on these by mistake.
    assert np.isnan(found[0].policy_logp_T).all() and np.isfinite(found[0].logp_T).all()


def test_stop_strings_are_cut_by_our_rule(engine, made):
    """Decoding is the id itself; the engine knows nothing of strings."""

    def stops(tokens: list[int]) -> int | None:
        return next((t + 1 for t, token in enumerate(tokens) if token in (5, 6, 7)), None)

    plain = made(engine)
    plain.start(params())
    whole = by_number(plain, requests())
    sampler = made(engine, how=HOW._replace(stop_strings=("x",)), stops=stops)
    sampler.start(params())
    cut = by_number(sampler, requests())
    assert engine.asked[-1]["stop"] == ["x"] and engine.asked[-1]["skip_special_tokens"]
    lengths = [stops(c.tokens_T.tolist()) for c in whole]
    assert any(lengths) and not all(lengths)
    for before, after, length in zip(whole, cut, lengths, strict=True):
        assert after.tokens_T.tolist() == before.tokens_T.tolist()[:length]
        assert len(after.logp_T) == len(after.tokens_T)
        assert after.ending == (before.ending if length is None else STOP)


# --- faults ---------------------------------------------------------------------------------------

RETRIED = [
    *("500", "hang", "drop", "text", "one less", "lengths", "missing", "nan", "positive", "null"),
    *("prompt", "abort", "early", "goes on", "no stop"),
]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Iterator[list[list[int]]]:
    yield _undisturbed(tmp_path_factory.mktemp("plain"))


@functools.cache
def _undisturbed(folder: Path) -> list[list[int]]:
    toy = ToyEngine(shift=0.5)
    group = WIRES["vllm"]
    found = []
    for p in range(3):
        seed = group_seed(7, (TRAIN, 100 + p, 0, 0))
        body = group.generate("policy", Group((3 + p, 4), 2, LONGEST, seed), HOW).body
        found += [toy.drawn(body["prompt"], body, seed + i)[0] for i in range(2)]
    toy.close()
    return found


@pytest.mark.parametrize("fault", RETRIED)
def test_what_fails_once_is_sent_again(engine, made, undisturbed, fault):
    sampler = made(engine, timeout_s=0.5 if fault == "hang" else 20.0)
    sampler.start(params())
    engine.faults.append(fault)
    assert ids(by_number(sampler, requests())) == undisturbed
    assert sampler.counts == Counts(retries=1)
    bodies = [str(body) for body in engine.asked]
    assert len(bodies) == 4 and len(set(bodies)) == 3, "again with the same seed and body"


def test_an_answer_twice_is_counted_once(engine, made, undisturbed):
    sampler = made(engine)
    sampler.start(params())
    engine.faults.append("duplicate")
    assert ids(by_number(sampler, requests())) == undisturbed
    assert sampler.counts == Counts(duplicates=1)


def test_an_id_that_the_trainer_does_not_know_breaks_its_sample_alone(engine, made):
    sampler = made(engine)
    sampler.start(params())
    engine.faults.append("forbidden")
    first, second = by_number(sampler, requests(1, 2))
    assert (first.ending, first.tokens_T.tolist()) == (NONFINITE, [5])
    assert second.ending in (STOP, LENGTH)


def test_what_fails_always_stops_the_run(engine, made):
    sampler = made(engine)
    sampler.start(params())
    engine.faults.extend(["500"] * (AGAIN + 1))
    with pytest.raises(SamplingError, match="status 500, EngineDeadError; sent 4 times"):
        list(sampler.sample(requests(1, 2)))
    assert len(engine.asked) == AGAIN + 1
    assert ids(by_number(sampler, requests(1, 2))), "and it can be used again"


def test_what_is_refused_is_not_sent_again(engine, made):
    sampler = made(engine)
    sampler.start(params())
    engine.faults.append("400")
    with pytest.raises(SamplingError, match="status 400, no such model `policy`"):
        list(sampler.sample(requests(1, 2)))
    assert len(engine.asked) == 1


def test_whoever_wants_no_more_ends_what_is_under_way(engine, made):
    sampler = made(engine)
    sampler.start(params())
    engine.faults.extend(["", "hang", "hang"])
    answers: Any = sampler.sample(requests())
    next(answers)
    _until(lambda: len(engine.asked) == 3)
    answers.close()
    _until(lambda: engine.disconnected == 2)
    sampler.start(params(0.6))
    assert len(by_number(sampler, requests())) == 6


class Stopped(BaseException):
    """As a signal's handler raises it."""


def test_a_signal_ends_the_wait(engine, made):
    def stop(*_: Any) -> None:
        raise Stopped

    sampler = made(engine)
    sampler.start(params())
    engine.faults.extend(["hang"] * 3)
    before = signal.signal(signal.SIGALRM, stop)
    began = time.monotonic()
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        with pytest.raises(Stopped):
            list(sampler.sample(requests()))
    finally:
        signal.signal(signal.SIGALRM, before)
    assert time.monotonic() - began < 3
    assert len(by_number(sampler, requests())) == 6


# --- weights --------------------------------------------------------------------------------------

LOAD = {
    "vllm": ["/pause", "/collective_rpc", "/reset_prefix_cache", "/update_weight_version"],
    "sglang": ["/pause_generation", "/update_weights_from_disk"],
}
RESUME = {"vllm": "/resume", "sglang": "/continue_generation"}


@pytest.mark.parametrize("kind", LOAD)
def test_weights_are_published_once_and_in_order(made, tmp_path, kind):
    toy = ToyEngine(kind)
    sampler = made(toy, kind=kind)
    first, second, third = params(0.5), params(0.6), params(0.7)
    sampler.start(first)
    assert toy.events == [*LOAD[kind], RESUME[kind]] and toy.shift == 0.5
    label = toy.label
    sampler.drawing(0.0, Choice()).start(first)
    sampler.start(first)
    assert len(toy.events) == len(LOAD[kind]) + 1, "the same weights are not published again"
    sampler.start(second)
    assert toy.shift == 0.6 and toy.label != label
    sampler.start(third)
    there = sorted(path.name for path in (tmp_path / "weights").iterdir())
    assert there == ["v2", "v3"], "the one before is kept for a restart"
    sampler.close()
    assert not (tmp_path / "weights").exists()
    toy.close()


def test_equal_but_other_arrays_are_published(engine, made):
    """Only the same objects are known to be the same; what looks equal may have changed."""
    sampler = made(engine)
    sampler.start(params())
    sampler.start(params())
    assert engine.events.count("/collective_rpc") == 2


def test_a_cache_that_is_not_reset_is_asked_again(engine, made):
    engine.cache_resets.extend([False, True])
    made(engine).start(params())
    assert engine.events.count("/reset_prefix_cache") == 2
    engine.cache_resets.extend([False] * (AGAIN + 1))
    with pytest.raises(SamplingError, match="reset_prefix_cache.*expected success; restart it"):
        made(engine).start(params())


def test_a_reload_that_only_warns_is_seen(engine, made):
    sampler = made(engine)
    sampler.start(params(0.5))
    engine.reload = "warn"
    with pytest.raises(SamplingError, match="moved otherwise than ours"):
        sampler.start(params(0.5005))  # near enough that the log-probabilities agree
    engine.reload = "ok"
    with pytest.raises(SamplingError, match="no engine is left"):
        sampler.start(params(0.5005))  # only a restart helps
    engine.label = "default"  # as after one
    sampler.start(params(0.5005))
    assert len(by_number(sampler, requests())) == 6


def test_weights_of_another_model_are_seen(engine, made):
    engine.reload = "warn"
    with pytest.raises(SamplingError, match="nats from ours on average, expected at most"):
        made(engine).start(params(0.5))


@pytest.mark.parametrize("kind", LOAD)
def test_an_engine_with_half_of_the_weights_is_never_resumed(made, kind):
    toy = ToyEngine(kind)
    sampler = made(toy, kind=kind)
    sampler.start(params(0.5))
    toy.events.clear()
    toy.reload = "half"
    with pytest.raises(SamplingError, match="may hold a part of the weights: restart it"):
        sampler.start(params(0.6))
    assert toy.is_paused and RESUME[kind] not in toy.events
    toy.close()


def test_closed_admin_routes_are_named(made, monkeypatch):
    toy = ToyEngine()
    monkeypatch.setattr(
        toy.server.RequestHandlerClass,
        "admin",
        lambda self, path, body: self.answer({"detail": "Not Found"}, 404),
    )
    with pytest.raises(SamplingError, match="status 404, Not Found.*VLLM_SERVER_DEV_MODE=1"):
        made(toy).start(params())
    toy.close()


def test_an_engine_that_serves_something_else_is_refused(engine, made):
    engine.name = "other"
    with pytest.raises(SamplingError, match="serves 'other', expected Sampler.served_model"):
        made(engine).start(params())


def test_an_engine_that_lost_its_weights_gets_them_again(engine, made, undisturbed):
    """Somebody started it again during the rollout: it works, with weights of its own."""
    sampler = made(engine)
    sampler.start(params())
    engine.faults.append("drop")
    engine.shift, engine.label = 0.1, "default"
    sampler._at_once = 1
    assert ids(by_number(sampler, requests())) == undisturbed
    assert sampler.counts == Counts(retries=1, reloads=1)


# --- several engines, and engines of our own ------------------------------------------------------


def test_one_of_two_engines_dies(made, undisturbed):
    well, ill = ToyEngine(), ToyEngine()
    sampler = made(well, ill)
    sampler.start(params())
    by_number(sampler, requests())
    assert well.asked and ill.asked, "groups are spread"
    ill.die_after = 1
    assert ids(by_number(sampler, requests(3))) == undisturbed
    assert len(by_number(sampler, requests(20, 1))) == 20
    assert sampler.counts.retries >= 1 and sampler.counts.restarts == 0
    sampler.start(params(0.6))  # goes on without it
    asked = len(ill.asked)
    assert len(by_number(sampler, requests())) == 6 and len(ill.asked) == asked
    ill.is_dead, ill.die_after = False, None
    sampler.start(params(0.7))  # it is back, and has the weights
    assert ill.shift == 0.7
    by_number(sampler, requests(20, 1))
    assert len(ill.asked) > asked
    well.is_dead = ill.is_dead = True
    with pytest.raises(SamplingError, match="no engine is left to sample from"):
        made(well, ill, start_s=0.2).start(params(0.8))
    for toy in (well, ill):
        toy.close()


def owned(tmp_path: Path, *more: str) -> Owned:
    words = [sys.executable, engine_toy.__file__, "{model}", "{port}", "vllm", *more]
    return Owned(" ".join(words), tmp_path / "engine.log")


def test_an_engine_of_our_own_is_started_and_ended(made, tmp_path, undisturbed):
    process = owned(tmp_path)
    sampler = made(process)
    sampler.start(params())
    assert ids(by_number(sampler, requests())) == undisturbed
    sampler.start(params(0.6))  # by a reload
    assert by_number(sampler, requests())[0].tokens_T.size
    log = (tmp_path / "engine.log").read_text()
    assert log.count("serving") == 1 and "/v1" in log.split("serving")[1].split("\n")[0]
    assert (tmp_path / "weights" / "v1" / "config.json").exists(), "it was started on it"
    sampler.start(params(0.7))
    assert not (tmp_path / "weights" / "v1" / "model.safetensors").exists()
    assert process.is_running
    sampler.close()
    assert not process.is_running and not (tmp_path / "weights").exists()


def test_an_engine_of_our_own_dies_within_a_rollout(made, tmp_path, undisturbed, monkeypatch):
    monkeypatch.setenv("TOY_MARK", str(tmp_path / "mark"))
    sampler = made(owned(tmp_path, "--die-once", "1"))
    sampler.start(params(0.4))
    assert (tmp_path / "mark").exists()
    sampler.start(params(0.5))
    assert ids(by_number(sampler, requests())) == undisturbed
    assert sampler.counts.restarts == 1 and sampler.counts.retries >= 1
    assert (tmp_path / "engine.log").read_text().count("serving") == 2


def test_an_engine_of_our_own_with_uncertain_weights_is_started_again(made, tmp_path, undisturbed):
    sampler = made(owned(tmp_path))
    sampler.start(params(0.4))
    speaker = sampler._engines.fleet.members[0].engine
    load = speaker.wire.load

    def broken(folder: str, label: str) -> Any:
        return load(folder, label)._replace(path="/collective_rpc/none", accept=lambda _: "half")

    speaker.wire = speaker.wire._replace(load=broken)
    sampler.start(params(0.5))
    assert sampler.counts == Counts(restarts=1)
    assert ids(by_number(sampler, requests())) == undisturbed


def test_a_command_that_does_not_work_shows_its_log(made, tmp_path):
    program = "'import sys; print(sys.argv); 1/0'"
    process = Owned(f"{sys.executable} -c {program} {{model}} {{port}}", tmp_path / "log")
    with pytest.raises(SamplingError, match=r"(?s)ended with status 1.*/v1', '\d+.*ZeroDivision"):
        made(process).start(params())
    with pytest.raises(SamplingError, match="(?s)ended with status.*no_such_program"):
        made(Owned("no_such_program {model} {port}", tmp_path / "log")).start(params())


def test_an_engine_of_our_own_ends_with_a_run_that_is_killed(tmp_path):
    """Nothing of a killed process runs; its pipe closes, and the keeper ends the engine."""
    code = f"""
import sys, time
from pathlib import Path
sys.path.insert(0, {str(Path(engine_toy.__file__).parent)!r})
import engine_toy
from aspo_jax.engines.owned import Owned
engine_toy.save(0.5, Path({str(tmp_path / "model")!r}))
words = [sys.executable, engine_toy.__file__, "{{model}}", "{{port}}"]
process = Owned(" ".join(words), Path({str(tmp_path / "log")!r}))
print(process.start(Path({str(tmp_path / "model")!r})), flush=True)
time.sleep(60)
"""
    run = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert run.stdout is not None
    port = int(run.stdout.readline().rpartition(":")[2])
    _until(lambda: _listens(port))
    run.kill()
    run.communicate()
    _until(lambda: not _listens(port))


def _listens(port: int) -> bool:
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) == 0


def _until(is_true: Any) -> None:
    end = time.monotonic() + 20
    while not is_true():
        assert time.monotonic() < end
        time.sleep(0.02)
