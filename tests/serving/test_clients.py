"""Other people's clients at a server of ours, and what they find beside what we find ourselves.

    ASPO_CLIENTS=PYTHON ASPO_VERIFIERS=PYTHON ASPO_MODELS=FOLDER \
        pytest -m 'slow or not slow' -n 0 tests/serving/test_clients.py

The first python has `openai`, `lm-eval[api]` and `inspect-ai`, the second `verifiers`; FOLDER holds
``smollm2``. A client that is installed beside us needs no variable, and is then asked in every test
session. None of them reaches beyond loopback.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq
import pytest
from servers import MODEL, Served, client_python, real_model, run_client, serving, write_toy

from aspo_jax.data import encode, load_tokenizer, render

PROGRAMS = Path(__file__).with_name("programs")
EXAMPLES = Path(__file__).parents[2] / "examples" / "serving"
TOKENS = 32  # the longest answer to a sum, as in the files of the examples
SUMS = [json.loads(line) for line in (EXAMPLES / "sums.jsonl").read_text().splitlines()]


Test = Callable[..., None]


def asks(package: str, variable: str = "ASPO_CLIENTS") -> Callable[[Test], Test]:
    """Slow, unless the client is installed beside us; skipped where its python is unknown."""

    def mark(test: Test) -> Test:
        if importlib.util.find_spec(package):
            return test
        reason = f"{package} is not installed here, and {variable} names no python that has it"
        return pytest.mark.slow(pytest.mark.skipif(variable not in os.environ, reason=reason)(test))

    return mark


@pytest.fixture(scope="module", params=["toy", pytest.param("smollm2", marks=pytest.mark.slow)])
def served(request, tmp_path_factory) -> Iterator[Served]:
    home = tmp_path_factory.mktemp(request.param)
    is_toy = request.param == "toy"
    folder = write_toy(home / "model") if is_toy else real_model(request.param)
    with serving(folder, home / "log") as server:
        yield server


# --- openai ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def openai(served) -> dict[str, Any]:
    """All that the SDK made of the server."""
    words = (str(PROGRAMS / "openai_calls.py"), served.url, MODEL, "The capital of France is")
    return json.loads(run_client(client_python("openai"), *words))


@asks("openai")
def test_openai_draws_the_same_for_the_same_seed(openai):
    assert openai["models"] == [MODEL]
    texts = [choice["text"] for choice in openai["text"]["choices"]]
    assert texts == [choice["text"] for choice in openai["again"]["choices"]]
    assert texts[0] != texts[1]
    assert {int(i): text for i, text in openai["text_stream"].items()} == dict(enumerate(texts))


@asks("openai")
def test_openai_reads_log_probabilities(openai):
    for choice in openai["text"]["choices"]:
        logprobs = choice["logprobs"]
        assert len(logprobs["tokens"]) == len(logprobs["token_logprobs"]) <= 12
        for token, logp, top in zip(
            logprobs["tokens"],
            logprobs["token_logprobs"],
            logprobs["top_logprobs"],
            strict=True,
        ):
            assert logp <= 0 and top[token] >= logp and 2 <= len(top) <= 3
    (choice,) = openai["chat"]["choices"]
    content = choice["logprobs"]["content"]
    assert "".join(entry["token"] for entry in content).startswith(choice["message"]["content"])
    for entry in content:
        assert len(entry["top_logprobs"]) == 2 and entry["logprob"] <= 0
        assert entry["logprob"] <= max(top["logprob"] for top in entry["top_logprobs"])
        assert bytes(entry["bytes"]).decode() == entry["token"]


@asks("openai")
def test_openai_streams_a_chat(openai):
    (choice,), stream = openai["chat"]["choices"], openai["chat_stream"]
    assert stream["text"] == choice["message"]["content"]
    assert stream["roles"] == ["assistant"] and stream["endings"] == [choice["finish_reason"]]
    (usage,) = stream["usage"]
    assert usage == openai["chat"]["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


@asks("openai")
def test_openai_stops_where_it_was_told(openai):
    (whole,), (cut,) = openai["greedy"]["choices"], openai["stopped"]["choices"]
    assert cut["text"] == whole["text"].partition("e")[0]
    if "e" in whole["text"]:
        assert cut["finish_reason"] == "stop" and cut["stop_reason"] == "e"


@asks("openai")
def test_openai_may_offer_tools(openai):
    (choice,) = openai["tools"]["choices"]
    assert choice["finish_reason"] in ("stop", "length") and not choice["message"]["tool_calls"]


@asks("openai")
def test_openai_knows_our_errors(openai):
    found = {name: (e["type"], e["status"]) for name, e in openai["errors"].items()}
    assert found == {
        "model": ("NotFoundError", 404),
        "temperature": ("BadRequestError", 400),
        "length": ("BadRequestError", 400),
    }
    assert "`nobody`" in openai["errors"]["model"]["body"]["message"]
    assert "maximum context length" in openai["errors"]["length"]["body"]["message"]
    assert openai["errors"]["length"]["code"] == "context_length_exceeded"
    assert "temperature" in openai["errors"]["temperature"]["body"]["message"]


# --- what our own evaluation says of the sums -----------------------------------------------------


class Found(NamedTuple):
    """The score of the sums and the greedy texts, by any harness."""

    score: float
    texts: list[str]


@pytest.fixture(scope="module")
def evaluated(served, tmp_path_factory) -> Found:
    """``python -m aspo_jax.evaluate``, which samples without a server."""
    out = tmp_path_factory.mktemp("evaluated") / "out"
    flags = ("--data", EXAMPLES / "sums.jsonl", "--grader", "number", "--out", out)
    drawing = ("--temperature", "0", "--max-response-tokens", TOKENS)
    words = [str(word) for word in (served.folder, *flags, *drawing)]
    command = [sys.executable, "-m", "aspo_jax.evaluate", *words]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (figures,) = json.loads((out / "report.json").read_text())["figures"].values()
    rows = pq.read_table(out / "samples.parquet").to_pylist()
    return Found(figures["avg"]["value"], [row["response"] for row in rows])


# --- lm-eval --------------------------------------------------------------------------------------


def lm_eval(
    served: Served,
    out: Path,
    kind: str,
    task: str,
    *flags: str,
    folder: Path = EXAMPLES,
    **more: Any,
) -> tuple[dict[str, float], list[Mapping[str, Any]]]:
    """Its figures of a task and the samples, in the order of the file.

    kind: of its model, which says the route. folder: of the task. more: arguments of the model.
    """
    python = client_python("lm_eval")
    route = "chat/completions" if "chat" in kind else "completions"
    arguments = {
        "model": MODEL,
        "base_url": f"{served.url}/v1/{route}",
        "num_concurrent": 4,
        **more,
    }
    text = ",".join(f"{name}={value}" for name, value in arguments.items())
    words = ["-m", "lm_eval", "run", "--model", kind, "--model_args", text, "--tasks", task]
    words += ["--include_path", ".", "--log_samples", "--output_path", str(out), *flags]
    cache = str(out / "cache")
    more_environment = {"OPENAI_API_KEY": "EMPTY", "HF_HUB_OFFLINE": "1", "HF_HOME": cache}
    run_client(python, *words, cwd=folder, **more_environment)
    (results,) = (out / MODEL).glob("results_*.json")
    (samples,) = (out / MODEL).glob(f"samples_{task}_*.jsonl")
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    figures = json.loads(results.read_text())["results"][task]
    return figures, sorted(rows, key=lambda row: row["doc_id"])


REMOTE = {"tokenizer_backend": "remote", "tokenized_requests": True}


@asks("lm_eval")
def test_lm_eval_finds_the_likelihoods_of_transformers(served, tmp_path):
    figures, rows = lm_eval(served, tmp_path, "local-completions", "facts", **REMOTE)
    likelihood = their_likelihoods(served.folder)
    right = 0
    for row in rows:
        asked = row["arguments"].values()
        expected = [likelihood(pair["arg_0"], pair["arg_1"]) for pair in asked]
        found = [float(logp) for ((logp, _),) in row["resps"]]
        assert found == pytest.approx([logp for logp, _ in expected], abs=1e-4)
        assert [greedy == "True" for ((_, greedy),) in row["resps"]] == [g for _, g in expected]
        right += found.index(max(found)) == row["doc"]["answer"]
    assert figures["acc,none"] == pytest.approx(right / len(rows))
    assert len(rows) == 8


def their_likelihoods(folder: Path) -> Any:
    """(context, ending) -> the ending's log-probability by transformers, and is it the greedy one.

    Encoded as lm-eval does it: together, and the context's own ids are cut off.
    """
    torch: Any = pytest.importorskip("torch")
    transformers: Any = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = load_tokenizer(folder)

    def likelihood(context: str, ending: str) -> tuple[float, bool]:
        whole, given = encode(tokenizer, context + ending), len(encode(tokenizer, context))
        with torch.no_grad():
            logp_TV = model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
        drawn = whole[given:]
        steps = logp_TV[given - 1 : -1]
        logp = sum(steps[t, token].item() for t, token in enumerate(drawn))
        return logp, steps.argmax(-1).tolist() == drawn

    return likelihood


@asks("lm_eval")
def test_lm_eval_scores_a_chat_as_we_do(served, evaluated, tmp_path):
    flags = ("--apply_chat_template",)
    figures, rows = lm_eval(served, tmp_path, "local-chat-completions", "sums", *flags)
    assert Found(figures["exact_match,last_number"], texts_of(rows)) == evaluated


@asks("lm_eval")
def test_lm_eval_scores_given_prompts_as_we_do(served, evaluated, tmp_path):
    """Completions of ids that it has from our /tokenize: the prompts are rendered beforehand."""
    tokenizer = load_tokenizer(served.folder)
    for row in SUMS:
        prompt = render(tokenizer, [{"role": "user", "content": row["prompt"]}])
        with (tmp_path / "sums.jsonl").open("a") as file:
            file.write(json.dumps(row | {"prompt": prompt}) + "\n")
    shutil.copy(EXAMPLES / "sums.yaml", tmp_path)
    figures, rows = lm_eval(
        served, tmp_path / "out", "local-completions", "sums", folder=tmp_path, **REMOTE
    )
    assert Found(figures["exact_match,last_number"], texts_of(rows)) == evaluated


def texts_of(rows: list[Mapping[str, Any]]) -> list[str]:
    return [text for row in rows for (text,) in row["resps"]]


# --- inspect-ai -----------------------------------------------------------------------------------


@asks("inspect_ai")
def test_inspect_scores_as_we_do(served, evaluated, tmp_path):
    python = client_python("inspect_ai")
    words = ["-m", "inspect_ai", "eval", "sums_task.py", "--display", "plain"]
    words += ["--model", f"openai-api/aspo/{MODEL}", "--log-format", "json"]
    words += ["--log-dir", str(tmp_path / "logs")]
    variables = {"ASPO_API_KEY": "EMPTY", "ASPO_BASE_URL": f"{served.url}/v1"}
    run_client(python, *words, cwd=EXAMPLES, **variables)
    (log,) = (tmp_path / "logs").glob("*.json")
    found = json.loads(log.read_text())
    assert found["status"] == "success"
    samples = sorted(found["samples"], key=lambda sample: sample["id"])
    texts = [sample["output"]["choices"][0]["message"]["content"] for sample in samples]
    assert texts == evaluated.texts
    (score,) = found["results"]["scores"]
    assert score["metrics"]["accuracy"]["value"] == pytest.approx(evaluated.score)


# --- verifiers ------------------------------------------------------------------------------------


def vf_eval(served: Served, out: Path, *flags: str) -> list[Mapping[str, Any]]:
    """The traces of three tasks of `calc_v1`, each twice."""
    python = client_python("verifiers", "ASPO_VERIFIERS")
    program = "from verifiers.v1.cli.eval.main import main; main()"
    words = ["-c", program, "calc_v1", "-m", MODEL, "-n", "3", "-r", "2", "-c", "4", "-o", str(out)]
    words += ["--client.base-url", f"{served.url}/v1", "--client.api-key-var", "NO_KEY"]
    words += ["--env.agent.runtime.type", "subprocess", "--no-push", "--no-rich"]
    words += ["--env.agent.harness.id", "calc_v1", "--sampling.max-tokens", "16", *flags]
    run_client(
        python, *words, cwd=out, PYTHONPATH=str(EXAMPLES), HF_HUB_OFFLINE="1", NO_KEY="EMPTY"
    )
    (path,) = out.glob("*/traces.jsonl")
    episodes = [json.loads(line) for line in path.read_text().splitlines()]
    traces = [trace for episode in episodes for trace in episode["traces"]]
    assert len(traces) == 6 and all(trace["ok"] for trace in traces), traces
    return traces


def messages_of(trace: Mapping[str, Any]) -> list[dict[str, str]]:
    return [
        {"role": n["message"]["role"], "content": n["message"]["content"]}
        for n in trace["nodes"]
        if not n["sampled"]
    ]


@asks("verifiers", "ASPO_VERIFIERS")
def test_verifiers_chats_for_an_evaluation(served, tmp_path):
    """It writes a seed as a text, and the same question with the same seed has one answer."""
    traces = vf_eval(served, tmp_path, "--sampling.temperature", "0.9", "--sampling.seed", "5")
    for trace in traces:
        *_, reply = trace["nodes"]
        body = {"messages": messages_of(trace), "temperature": 0.9, "seed": 5, "max_tokens": 16}
        (choice,) = served.ask("/v1/chat/completions", body)["choices"]
        assert reply["message"]["content"] == choice["message"]["content"]
        (call,) = trace["calls"]
        assert call["finish_reason"] == choice["finish_reason"]
        assert call["usage"]["completion_tokens"] > 0


@asks("verifiers", "ASPO_VERIFIERS")
def test_verifiers_gets_ids_and_log_probabilities_to_train_on(served, tmp_path):
    traces = vf_eval(
        served,
        tmp_path,
        *("--client.type", "train", "--client.renderer-model-name", str(served.folder)),
        *("--env.agent.harness.tools", "False", "--sampling.temperature", "0.7"),
    )
    tokenizer, distinct = load_tokenizer(served.folder), set()
    for trace in traces:
        ids, drawn, logp = row_of(trace)
        prompt = encode(tokenizer, render(tokenizer, messages_of(trace)))
        length = len(prompt)
        assert ids[:length] == prompt and drawn == [False] * length + [True] * (len(ids) - length)
        expected = scored(served, ids, 0.7)
        assert logp[length:] == pytest.approx(expected[length:], abs=1e-4)
        distinct.add(tuple(ids))
    assert len(distinct) == 6


def row_of(trace: Mapping[str, Any]) -> tuple[list[int], list[bool], list[float]]:
    """The one branch of a trace: ids, which of them were drawn, and their log-probabilities."""
    ids, drawn, logp = [], [], []
    for node in trace["nodes"]:
        ids += node["token_ids"]
        drawn += node["mask"]
        logp += spread(node)
    return ids, drawn, logp


def spread(node: Mapping[str, Any]) -> list[float]:
    """A log-probability for each id, of which only the drawn ones have one."""
    given = iter(node["logprobs"])
    is_whole = len(node["logprobs"]) == len(node["mask"])
    return [next(given) if is_whole or is_drawn else 0.0 for is_drawn in node["mask"]]


def scored(served: Served, ids: list[int], temperature: float) -> list[float]:
    """What transformers says of each id at a temperature; 0 of the first.

    What the policy never draws, <pad> and <bos>, has no share there either.
    """
    torch: Any = pytest.importorskip("torch")
    transformers: Any = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(served.folder, dtype=torch.float32)
    with torch.no_grad():
        logits_TV = model.eval()(torch.tensor([ids])).logits[0].double() / temperature
    tokenizer = load_tokenizer(served.folder)
    for special in (tokenizer.pad_token_id, tokenizer.bos_token_id):
        if special is not None and special != tokenizer.eos_token_id:
            logits_TV[:, special] = -math.inf
    logp_TV = logits_TV.log_softmax(-1)
    return [0.0, *(logp_TV[t, token].item() for t, token in enumerate(ids[1:]))]
