"""Published weights against `transformers`: logits, greedy texts, `check`, an export, bfloat16.

    ASPO_MODELS=FOLDER pytest -m slow -n 0 -s tests/model/test_real_weights.py

FOLDER holds ``smollm2`` (SmolLM2-135M-Instruct) and ``qwen05`` (Qwen2.5-Coder-0.5B-Instruct), or
one of them. What is measured is printed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy import toy_mesh

from aspo_jax.data import encode
from aspo_jax.library import Answer, Loaded, chat, configure, sample
from aspo_jax.model import build_model, load_params
from aspo_jax.policy import load_policy, save_policy

torch: Any = pytest.importorskip("torch")
transformers: Any = pytest.importorskip("transformers")

FOLDER = Path(os.environ.get("ASPO_MODELS", "/nowhere"))
NAMES = [name for name in ("smollm2", "qwen05") if (FOLDER / name).is_dir()]
TOKENS = 64
TIE = 1e-3  # nats between the two likeliest tokens: below, rounding may choose
QUESTIONS = (
    "What is the capital of France?",
    "Name three colours of the rainbow.",
    "Write a Python function that returns the square of a number.",
    "What is 17 + 25? Answer with the number alone.",
    "Translate 'good morning' into Spanish.",
    "Why is the sky blue? One sentence.",
    "List the first five prime numbers.",
    "Who wrote Romeo and Juliet?",
    "Give me a JSON object with the keys name and age.",
    "Explain to a child what a magnet does.",
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not NAMES, reason="ASPO_MODELS names no folder of smollm2 or qwen05"),
]


class Pair(NamedTuple):
    """One model twice, in float32, and the ids of the questions as the model reads them."""

    name: str
    ours: Loaded
    theirs: Any
    their_tokenizer: Any
    prompts: list[list[int]]


@pytest.fixture(scope="module", params=NAMES)
def pair(request) -> Pair:
    folder, mesh = FOLDER / request.param, toy_mesh()  # one device: each would hold a copy
    config = configure("countdown_cpu", f"Model.path={str(folder)!r}")
    policy = load_policy(config, folder, mesh)
    params = load_params(folder, policy.model.config, shardings=policy.model.shardings(mesh))
    rescore: Any = None  # nothing here scores texts
    ours = Loaded(config, mesh, policy, params, rescore, {})
    prompts = [encode(ours.policy.tokenizer, chat(ours, question)) for question in QUESTIONS]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return Pair(request.param, ours, theirs.eval(), tokenizer, prompts)


@pytest.fixture(scope="module")
def answers(pair) -> list[Answer]:
    texts = [chat(pair.ours, question) for question in QUESTIONS]
    drawn = sample(pair.ours, texts, max_tokens=TOKENS, temperature=0.0)
    return [answer for (answer,) in drawn]


@pytest.fixture
def say(capsys):
    def line(text: str) -> None:
        with capsys.disabled():
            print(f"\n  {text}", end="")

    return line


@pytest.mark.parametrize("name", NAMES)
def test_check_agrees(name, tmp_path, say):
    """In a process of its own: with one device, and before the weights are here twice."""
    rows = [{"prompt": question, "answer": "x", "kind": "exact"} for question in QUESTIONS]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "Model.path": str(FOLDER / name),
        "Model.dtype": "bfloat16",
        "Data.source": "files",
        "Data.train_path": str(tmp_path / "rows.jsonl"),
        "Data.eval_path": str(tmp_path / "rows.jsonl"),
        "Sampler.max_prompt_tokens": 64,
        "Sampler.max_response_tokens": 32,
        "Sampler.slots": 8,
        "Train.row_tokens": 128,
        "Train.rows_per_microbatch": 4,
        "Train.prompts_per_step": 4,
        "Train.prompts_per_minibatch": 4,
        "Train.samples_per_prompt": 2,
        "Run.folder": str(tmp_path / "run"),
    }
    words = [w for key, value in settings.items() for w in ("--set", f"{key}={value!r}")]
    command = [sys.executable, "-m", "aspo_jax.check", *words, "--prompts", "4"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    say(f"{name}: check: {done.stdout.strip().splitlines()[-1]}")


def their_logits(model: Any, ids: Sequence[int]) -> np.ndarray:
    with torch.no_grad():
        return model(input_ids=torch.tensor([list(ids)])).logits[0].float().numpy()


def our_logits(pair: Pair, dtype: Any, prompts: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """Of each prompt, alone in its row; all padded to one length, so that one program serves."""
    model = build_model(pair.ours.policy.model.config, dtype=dtype)
    longest = max(map(len, prompts))

    @jax.jit
    def run(params, token_BT, position_BT, segment_BT):
        hidden = model.apply(params, token_BT, position_BT, segment_BT)[0].astype(jnp.float32)
        return hidden @ model.unembedding(params).astype(dtype).astype(jnp.float32).T

    found = []
    for ids in prompts:
        token_BT = np.array([[*ids, *[0] * (longest - len(ids))]])
        segment_BT = (np.arange(longest) < len(ids)).astype(np.int32)[None]
        logits = run(pair.ours.params, token_BT, np.arange(longest)[None], segment_BT)
        found.append(np.asarray(logits)[0, : len(ids)])
    return found


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def test_prompts_have_the_ids_of_auto_tokenizer(pair):
    for question, ids in zip(QUESTIONS, pair.prompts, strict=True):
        theirs = pair.their_tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
        )
        assert theirs == ids


def test_float32_logits(pair, say):
    ours = our_logits(pair, jnp.float32, pair.prompts)
    largest, divergence, positions = 0.0, 0.0, 0
    for ids, found in zip(pair.prompts, ours, strict=True):
        expected = their_logits(pair.theirs, ids)
        np.testing.assert_array_equal(found.argmax(-1), expected.argmax(-1))
        largest = max(largest, float(np.abs(found - expected).max()))
        logp, own = log_softmax(expected), log_softmax(found)
        divergence = max(divergence, float((np.exp(logp) * (logp - own)).sum(-1).max()))
        positions += len(ids)
    say(
        f"{pair.name}: float32 logits, {positions} positions: largest difference {largest:.1e}, "
        f"largest KL {divergence:.1e}, argmax equal everywhere"
    )
    assert largest <= 1e-3 and divergence <= 1e-7


def their_greedy(model: Any, ids: Sequence[int]) -> list[int]:
    with torch.no_grad():
        whole = model.generate(
            input_ids=torch.tensor([list(ids)]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            do_sample=False,
            repetition_penalty=1.0,
            temperature=None,
            top_k=None,
            top_p=None,
            max_new_tokens=TOKENS,
        )
    return whole[0, len(ids) :].tolist()


def test_greedy_tokens(pair, answers, say):
    """The same ids until an answer ends; a difference only where two tokens tie, and it is said."""
    tokens, ties = 0, []
    for ids, answer in zip(pair.prompts, answers, strict=True):
        ours, theirs = answer.completion.tokens_T.tolist(), their_greedy(pair.theirs, ids)
        tokens += len(ours)
        if ours == theirs:
            continue
        first = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b)
        likeliest = np.sort(their_logits(pair.theirs, [*ids, *ours[:first]])[-1])[-2:]
        ties.append(f"at token {first}, {likeliest[1] - likeliest[0]:.1e} apart")
        assert likeliest[1] - likeliest[0] <= TIE, (ours, theirs)
    say(
        f"{pair.name}: greedy: {len(answers) - len(ties)} of {len(answers)} texts equal, "
        f"{tokens} tokens; ties: {', '.join(ties) or 'none'}"
    )


def test_an_export_gives_the_same_weights_and_texts(pair, answers, tmp_path, say):
    save_policy(pair.ours.policy, pair.ours.params, tmp_path / "out", "float32")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert again.dtype == torch.float32
    state = again.state_dict()
    assert all(torch.equal(x, state[name]) for name, x in pair.theirs.state_dict().items())
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for question, answer in list(zip(QUESTIONS, answers, strict=True))[:3]:
        message = [{"role": "user", "content": question}]
        ids = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
        text = tokenizer.decode(their_greedy(again.eval(), ids), skip_special_tokens=True)
        assert text == answer.text
    say(f"{pair.name}: export: weights equal bit for bit, 3 of 3 texts equal")
    say(f"{pair.name}: {QUESTIONS[0]} -> {answers[0].text!r}")


def test_bfloat16_is_as_far_from_float32_as_theirs(pair, say):
    """Statistics, and a loose bound: our rounding is no worse than twice theirs."""
    some = pair.prompts[:4]
    half = pair.theirs.to(torch.bfloat16)
    try:
        rounded = [their_logits(half, ids) for ids in some]
    finally:
        pair.theirs.to(torch.float32)  # the weights are bfloat16 numbers: nothing was lost
    exact, ours = our_logits(pair, jnp.float32, some), our_logits(pair, jnp.bfloat16, some)
    errors = {}
    for who, found in (("ours", ours), ("theirs", rounded)):
        gaps = [
            np.abs(log_softmax(a) - log_softmax(b)).max(-1, initial=0.0, where=log_softmax(b) > -12)
            for a, b in zip(found, exact, strict=True)
        ]
        difference = np.concatenate(
            [np.abs(a - b).ravel() for a, b in zip(found, exact, strict=True)]
        )
        argmax = [a.argmax(-1) == b.argmax(-1) for a, b in zip(found, exact, strict=True)]
        errors[who] = float(difference.mean())
        say(
            f"{pair.name}: bfloat16, {who}: logits differ from float32 by {difference.mean():.1e} "
            f"on average, {difference.max():.1e} at most; log-probabilities above -12 by "
            f"{np.concatenate(gaps).max():.1e} at most; "
            f"argmax equal at {np.concatenate(argmax).mean():.1%}"
        )
    assert errors["ours"] <= 2 * errors["theirs"]
