"""What we ask of an external engine and read from it, against a real vLLM.

    ASPO_VLLM=PATH ASPO_MODELS=FOLDER pytest -m slow -n 0 -s tests/engines/test_contract.py

PATH is the executable of a vLLM for the CPU (docs/serving.md says how to come by one), FOLDER holds
``smollm2``; without FOLDER a random model alone is served. What is measured is printed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from servers import MODEL, real_model, vllm, write_toy
from toy import toy_mesh

from aspo_jax.data import encode
from aspo_jax.engines.client import Engine, LoadFailed
from aspo_jax.engines.loop import Loop
from aspo_jax.engines.weights import write_head
from aspo_jax.engines.wire import LENGTH, STOP, WIRES, Answer, EngineError, Group, How
from aspo_jax.learner import make_old_policy, place
from aspo_jax.library import configure
from aspo_jax.model import load_params
from aspo_jax.policy import Policy, load_policy, save_policy
from aspo_jax.rows import BatchShape, answered, fill

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("ASPO_VLLM" not in os.environ, reason="ASPO_VLLM names no vllm executable"),
]
TEXT = "The capital of France is Paris, and the capital of Italy is"
SAMPLES, TOKENS, SEED = 4, 48, 11
NEAR = 1e-3  # nats, the largest: float32 here and there, by other kernels


class Pair(NamedTuple):
    """A model twice: in a vLLM, and here with its float32 weights."""

    engine: Engine
    loop: Loop
    policy: Policy
    params: Any
    how: How

    @property
    def prompt(self) -> list[int]:
        return encode(self.policy.tokenizer, TEXT)

    def ask(self, group: Group | None = None, **changes: Any) -> list[Answer]:
        """The answers to the prompt; ``changes`` are of `How`."""
        group = group or Group(self.prompt, SAMPLES, TOKENS, SEED)
        return self.loop.run(self.engine.ask(group, self.how._replace(**changes))).answers

    def heard(self) -> np.ndarray:
        """What the engine says of the prompt's ids."""
        return self.loop.run(self.engine.score(self.prompt))

    def gap(self, answers: Sequence[Answer], params: Any = None, **head: Any) -> np.ndarray:
        """|engine's - trainer's log-probability| of every drawn id; ``head``: what differs."""
        examples = [answered(self.prompt, a.tokens_T, a.logp_T, 1.0, 0) for a in answers]
        length = len(self.prompt) + max(len(a.tokens_T) for a in answers)
        part = fill(examples, BatchShape(1, 1, len(examples), length, sequences=1))
        ours_BT = self.score(part, self.params if params is None else params, head)
        rows: Any = part.rows
        return np.abs(ours_BT - rows.sampler_logp_BT)[rows.is_response_BT]

    def score(self, part: Any, params: Any, head: dict[str, Any]) -> np.ndarray:
        mesh = toy_mesh()
        scorer = make_old_policy(self.policy.model, self.policy.head._replace(**head), mesh)
        return np.asarray(scorer(params, None, place(mesh, part)).old_logp_BT)

    def expected(self, params: Any) -> np.ndarray:
        """The trainer's log-probabilities of the prompt's ids, over the whole vocabulary."""
        ids = self.prompt
        shape = BatchShape(1, 1, 1, len(ids), sequences=1)
        part = fill([answered(ids[:1], np.array(ids[1:]), 0.0, 1.0, 0)], shape)
        every = np.ones(self.policy.model.config.vocab_size, bool)
        return self.score(part, params, {"is_allowed_V": every})[0, 0, : len(ids) - 1]


@pytest.fixture(scope="module", params=["toy", "smollm2"])
def pair(request, tmp_path_factory) -> Iterator[Pair]:
    home = tmp_path_factory.mktemp(request.param)
    folder = write_toy(home / "model") if request.param == "toy" else real_model(request.param)
    mesh = toy_mesh()
    policy = load_policy(configure("countdown_cpu", f"Model.path={str(folder)!r}"), folder, mesh)
    params = load_params(folder, policy.model.config, shardings=policy.model.shardings(mesh))
    write(policy, params, home / "engine")  # as a run starts and feeds it
    with vllm(home / "engine", home / "log") as server:
        loop, engine = Loop(), Engine(WIRES["vllm"], MODEL, server.url)
        yield Pair(engine, loop, policy, params, how_of(policy))
        loop.run(engine.close())
        loop.close()


def how_of(policy: Policy) -> How:
    """As in a run: the whole softmax but for what the policy never draws."""
    forbidden = np.flatnonzero(~np.asarray(policy.head.is_allowed_V)).tolist()
    stops, size = policy.stop_ids, len(policy.tokenizer)
    return How(1.0, 0, 1.0, 0.0, stops, (), tuple(forbidden), size)


def write(policy: Policy, params: Any, folder: Path) -> None:
    """The weights as a run publishes them for a vLLM."""
    save_policy(policy, params, folder, "float32")
    if policy.model.config.tie_embeddings:
        write_head(folder)


@pytest.fixture
def say(capsys) -> Callable[[str], None]:
    def line(text: str) -> None:
        with capsys.disabled():
            print(f"\n  {text}", end="")

    return line


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_drawn_ids_have_our_log_probabilities(pair, temperature, say):
    answers = pair.ask(temperature=temperature)
    gap = pair.gap(answers, temperature=temperature)
    say(f"temperature {temperature}: {gap.size} ids, {gap.mean():.1e} nats, {gap.max():.1e} most")
    assert len(answers) == SAMPLES and gap.size > SAMPLES and gap.max() < NEAR
    assert len({tuple(a.tokens_T) for a in answers}) == SAMPLES


def test_a_seed_names_its_sample(pair):
    """The same seed draws the same; sample i of a group is what the seed + i draws alone."""
    answers = pair.ask()
    again = pair.ask()
    assert [a.tokens_T.tolist() for a in answers] == [a.tokens_T.tolist() for a in again]
    for number, answer in enumerate(answers[:2]):
        (alone,) = pair.ask(Group(pair.prompt, 1, TOKENS, SEED + number))
        assert alone.tokens_T.tolist() == answer.tokens_T.tolist()
    (other,) = pair.ask(Group(pair.prompt, 1, TOKENS, SEED + SAMPLES))
    assert other.tokens_T.tolist() not in [a.tokens_T.tolist() for a in answers]


def test_an_answer_ends_at_its_first_stop_id_and_nowhere_else(pair):
    whole = pair.ask()[0].tokens_T.tolist()
    end = whole[len(whole) // 2]
    answer = pair.ask(stop_ids=(*pair.how.stop_ids, end))[0]
    assert answer.tokens_T.tolist() == whole[: whole.index(end) + 1] and answer.finish == STOP
    (cut,) = pair.ask(Group(pair.prompt, 1, 3, SEED))
    assert cut.tokens_T.tolist() == whole[:3] and cut.finish == LENGTH


def test_a_forbidden_id_is_not_drawn_and_has_no_share(pair):
    drawn = sorted({int(token) for answer in pair.ask() for token in answer.tokens_T})
    forbidden = tuple({*pair.how.forbidden, *drawn[::2]} - {*pair.how.stop_ids})
    answers = pair.ask(forbidden=forbidden)
    assert not any(token in forbidden for answer in answers for token in answer.tokens_T)
    is_allowed_V = np.ones(pair.policy.model.config.vocab_size, bool)
    is_allowed_V[list(forbidden)] = False
    assert pair.gap(answers, is_allowed_V=is_allowed_V).max() < NEAR
    assert pair.gap(answers).max() > 10 * NEAR  # it would be seen if they had one


def test_a_stop_string_ends_an_answer(pair):
    decode = pair.policy.decode
    whole = decode(pair.ask()[0].tokens_T)
    string = whole[len(whole) // 2 :][:2]
    answer = pair.ask(stop_strings=(string,))[0]
    assert answer.finish == STOP and string in decode(answer.tokens_T)
    assert string not in decode(answer.tokens_T[:-1])


def test_a_prompt_is_scored_as_by_the_trainer(pair, say):
    gap = np.abs(pair.heard() - pair.expected(pair.params))
    say(f"prompt: {gap.size} ids, {gap.mean():.1e} nats, {gap.max():.1e} at most")
    assert gap.max() < NEAR


def test_a_prompt_that_is_too_long_is_refused_for_good(pair):
    with pytest.raises(EngineError, match="maximum context length"):
        pair.ask(Group([5] * 2000, 1, 4, 0))


# --- weights: from here on the engine changes -----------------------------------------------------


def moved(params: Any, seed: int) -> Any:
    """Other weights, of which every tensor has changed by a hundredth."""
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(seed)
    noise = [1 + 0.01 * rng.standard_normal(x.shape).astype(np.float32) for x in leaves]
    return jax.tree.unflatten(tree, [x * n for x, n in zip(leaves, noise, strict=True)])


def test_weights_are_taken_whole_and_go_by_their_label(pair, tmp_path, say):
    before = pair.heard()
    one, two = moved(pair.params, 1), moved(pair.params, 2)
    for number, params in enumerate((one, two, pair.params)):
        folder = tmp_path / f"v{number}"
        write(pair.policy, params, folder)
        pair.loop.run(pair.engine.load(str(folder), f"run-{number}"))
        assert pair.loop.run(pair.engine.label()) == f"run-{number}"
        gap = pair.gap(pair.ask(), params)
        probe = np.abs(pair.heard() - pair.expected(params)).max()
        say(f"reload {number}: drawn {gap.max():.1e}, prompt {probe:.1e} nats at most")
        assert gap.max() < NEAR and probe < NEAR
        if params is not pair.params:
            assert np.abs(pair.heard() - before).mean() > 10 * NEAR
    np.testing.assert_allclose(pair.heard(), before, atol=NEAR)


def test_a_load_that_fails_says_so(pair, tmp_path):
    """An engine on which a load failed stays paused, and is to be started again."""
    with pytest.raises(LoadFailed, match="restart it"):
        pair.loop.run(pair.engine.load(str(tmp_path / "nothing"), "run-9"))
    assert pair.loop.run(pair.engine.label()) != "run-9"
