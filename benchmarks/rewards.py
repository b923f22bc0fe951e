"""Graders: how fast, how right, and what withstands what.

    python benchmarks/rewards.py speed      [--answers 400] [--programs 80]
    python benchmarks/rewards.py cases      ours, and Math-Verify as verl and as TRL call it
    python benchmarks/rewards.py attacks    every attack of tests/rewards/attacks.py in every tier
    python benchmarks/rewards.py data DATA  golds and reference solutions of public sets
    python benchmarks/rewards.py timeline   sampling and grading of the main job
    python benchmarks/rewards.py faults     a training run in which 1 % of the graders fail

Each prints Markdown for RESULTS.md. Linux. Rivals: Math-Verify called in this process, with its own
time limits and, as TRL does off the main thread, without; and a bare subprocess for a program.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import functools
import gzip
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from machine import header, table

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "rewards"))

import attacks  # noqa: E402  # pyright: ignore[reportMissingImports]
import math_cases  # noqa: E402  # pyright: ignore[reportMissingImports]

from aspo_jax.rewards import (  # noqa: E402
    RewardError,
    Rules,
    Scorer,
    Submission,
    Verdict,
)

PACKAGES = ("math-verify", "sympy", "latex2sympy2-extended")


def math_submission(response: str, gold: Any) -> Submission:
    return Submission("math", response, gold, True, 1)


def code_submission(program: str, answer: Any) -> Submission:
    return Submission("code", f"```python\n{program}\n```", answer, True, 1)


# --- rivals ---------------------------------------------------------------------------------------


def as_verl(gold: Any, response: str) -> bool:
    """Math-Verify the way verl's `math_verify` reward does: gold in a box, both extractions."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig
    from math_verify.errors import TimeoutException
    from math_verify.metric import math_metric

    metric = math_metric(
        gold_extraction_target=(LatexExtractionConfig(),),
        pred_extraction_target=(ExprExtractionConfig(), LatexExtractionConfig()),
    )
    with contextlib.suppress(Exception, TimeoutException):
        return metric([rf"\boxed{{{gold}}}"], [response])[0] == 1.0
    return False


def as_trl(gold: Any, response: str, seconds: int = 5) -> bool:
    """Math-Verify the way TRL's `accuracy_reward` does: one LaTeX extraction, box first."""
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse, verify

    gold_parsed = parse(f"${gold}$" if "$" not in str(gold) else str(gold), parsing_timeout=seconds)
    if not gold_parsed:
        return False
    config = LatexExtractionConfig(
        boxed_match_priority=0,
        try_extract_without_anchor=False,
        normalization_config=NormalizationConfig(units=True),
    )
    answer = parse(
        response, extraction_config=[config], extraction_mode="first_match", parsing_timeout=seconds
    )
    return verify(gold_parsed, answer, timeout_seconds=seconds)


def any_gold(judge: Callable[[Any, str], bool], gold: Any, response: str) -> bool:
    golds = gold if isinstance(gold, list) else [gold]
    return any(judge(one, response) for one in golds)


def bare_subprocess(program: str, stdin: str) -> str:
    done = subprocess.run(
        [sys.executable, "-I", "-c", program], input=stdin, capture_output=True, text=True
    )
    return done.stdout


# --- speed ----------------------------------------------------------------------------------------


def ordinary_answers(count: int) -> list[tuple[str, str]]:
    """(gold, response) as a training batch has them: mostly numbers, a third of them wrong."""
    rng = random.Random(0)
    n = functools.partial(rng.randint, 2, 999)
    kinds = [
        *[lambda: str(n())] * 11,
        *[lambda: rf"\frac{{{n()}}}{{{n()}}}"] * 3,
        *[lambda: f"{n()}.{n()}"] * 2,
        lambda: rf"{n()}\sqrt{{{n()}}}",
        lambda: rf"\frac{{{n()}\pi}}{{{n()}}}",
        lambda: f"({n()}, {n()})",
        lambda: f"x^2+{n()}x-{n()}",
        lambda: f"[{n()}, {1000 + n()})",
        lambda: f"{n()}+{n()}i",
    ]
    think = "<think>" + "First, consider the case. " * 40 + "</think>"
    found = []
    for _ in range(count):
        make = rng.choice(kinds)
        gold = make()
        said = gold if rng.random() < 2 / 3 else make()
        found.append((gold, f"{think}Therefore the answer is $\\boxed{{{said}}}$."))
    return found


def rate(scorer: Scorer, submissions: Sequence[Submission]) -> float:
    """Submissions per second, of the better of two rounds."""
    scorer.wait_until_ready()
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        scorer.score(submissions)
        seconds.append(time.perf_counter() - start)
    return len(submissions) / min(seconds)


def latencies(judge: Callable[[Any], object], items: Sequence[Any]) -> tuple[float, float, float]:
    """(per second, p50, p99) in seconds, one at a time."""
    each = []
    for item in items:
        start = time.perf_counter()
        judge(item)
        each.append(time.perf_counter() - start)
    ordered = sorted(each)
    return len(each) / sum(each), statistics.median(each), ordered[int(0.99 * (len(each) - 1))]


def row(name: str, figures: tuple[float, float, float]) -> list[str]:
    per_second, p50, p99 = figures
    return [name, f"{per_second:,.0f}", f"{1e3 * p50:.1f}", f"{1e3 * p99:.0f}"]


def one_by_one(scorer: Scorer) -> Callable[[Submission], object]:
    return lambda submission: scorer.score([submission])


def speed(answers: int, programs: int) -> None:
    print(
        header(
            "Graders: speed", f"python benchmarks/rewards.py speed --answers {answers}", PACKAGES
        )
    )
    pairs = ordinary_answers(answers)
    submissions = [math_submission(response, gold) for gold, response in pairs]
    rows = []
    with Scorer(1, Rules(5.0), kinds=("math",)) as scorer:
        scorer.wait_until_ready()
        rows.append(row("ours, one at a time", latencies(one_by_one(scorer), submissions)))
        rows.append(["ours, batch, 1 worker", f"{rate(scorer, submissions):,.0f}", "", ""])
    with Scorer(2, Rules(5.0), kinds=("math",)) as scorer:
        rows.append(["ours, batch, 2 workers", f"{rate(scorer, submissions):,.0f}", "", ""])
    for name, judge in (("as verl calls it", as_verl), ("as TRL calls it", as_trl)):
        judge("1", r"\boxed{1}")  # imports
        figures = latencies(lambda pair, judge=judge: judge(*pair), pairs)
        rows.append(row(f"Math-Verify in-process, {name}", figures))
    print(table(["ordinary answers", "per second", "p50 ms", "p99 ms"], rows) + "\n")
    _speed_with_blow_ups(submissions)
    _speed_of_programs(programs)


def _speed_with_blow_ups(submissions: Sequence[Submission]) -> None:
    hostile = [
        math_submission(math_cases.BLOW_UPS[name], "42")
        for name in ("tower of powers", "long number", "huge sum", "large expansion")
    ]
    mixed = [*submissions[:396], *hostile]
    random.Random(0).shuffle(mixed)
    with Scorer(2, Rules(5.0), kinds=("math",)) as scorer:
        scorer.wait_until_ready()
        start = time.perf_counter()
        reasons = Counter(verdict.reason for verdict in scorer.score(mixed))
        seconds = time.perf_counter() - start
    print(
        f"{len(mixed)} answers, 1 % of them blow-ups, 2 workers, limit 5 s: {seconds:.1f} s; ",
        end="",
    )
    print(", ".join(f"{reason} {count}" for reason, count in sorted(reasons.items())) + "\n")


def _speed_of_programs(count: int) -> None:
    program = "n = int(input())\nprint(sum(i * i for i in range(n)))"
    answer = {"inputs": ["100"], "outputs": [str(sum(i * i for i in range(100)))]}
    submissions = [code_submission(program, answer)] * count
    rows = [
        row(
            "bare `python -I`, in sequence",
            latencies(lambda _: bare_subprocess(program, "100"), submissions),
        )
    ]
    for tier in ("rlimits", "landlock", "namespaces"):
        rules = Rules(sandbox=tier)
        try:
            scorer = Scorer(1, rules, kinds=("code",))
        except RewardError as error:
            print(f"{tier} left out: {error}")
            continue
        with scorer:
            scorer.wait_until_ready()
            rows.append(row(f"{tier}, one at a time", latencies(one_by_one(scorer), submissions)))
            rows.append([f"{tier}, batch, 1 worker", f"{rate(scorer, submissions):,.0f}", "", ""])
        with Scorer(2, rules, kinds=("code",)) as scorer:
            rows.append([f"{tier}, batch, 2 workers", f"{rate(scorer, submissions):,.0f}", "", ""])
    print(table(["programs with one test", "per second", "p50 ms", "p99 ms"], rows) + "\n")


# --- cases ----------------------------------------------------------------------------------------


def cases() -> None:
    print(header("Graders: mathematics", "python benchmarks/rewards.py cases", PACKAGES))
    listed = math_cases.listed()
    core = [case for _, *case in listed]
    with Scorer(2, Rules(5.0), kinds=("math",)) as scorer:
        verdicts = scorer.score([math_submission(response, gold) for gold, response, _ in core])
    judged = {"ours": [verdict.is_right for verdict in verdicts]}
    for name, judge in (("Math-Verify as verl", as_verl), ("Math-Verify as TRL", as_trl)):
        judged[name] = [any_gold(judge, gold, response) for gold, response, _ in core]
    kinds = [kind for kind, *_ in listed]
    print(
        table(["grader", "right", "false positives", "false negatives"], _totals(core, judged)),
        "\n",
    )
    print(table(["cases", "number", *judged], _by_kind(core, kinds, judged)) + "\n")
    for name, said in judged.items():
        wrong = [(g, r) for (g, r, right), s in zip(core, said, strict=True) if s != right]
        shown = "; ".join(f"`{g}` / `{r[-60:]!r}`" for g, r in wrong[:20])
        more = f"; and {len(wrong) - 20} more" if len(wrong) > 20 else ""
        print(f"- {name}, wrong: {shown or 'none'}{more}")
    _blow_ups()


def _totals(core, judged) -> list[list[str]]:
    rows = []
    negatives = sum(not is_right for *_, is_right in core)
    for name, said in judged.items():
        right = sum(s == case[2] for s, case in zip(said, core, strict=True))
        positive = sum(s and not case[2] for s, case in zip(said, core, strict=True))
        negative = sum(not s and case[2] for s, case in zip(said, core, strict=True))
        share = f"{right} of {len(core)} = {100 * right / len(core):.1f} %"
        rows.append(
            [name, share, f"{positive} of {negatives}", f"{negative} of {len(core) - negatives}"]
        )
    return rows


def _by_kind(core, kinds, judged) -> list[list[str]]:
    rows = []
    for kind in dict.fromkeys(kinds):
        places = [i for i, k in enumerate(kinds) if k == kind]
        right = [str(sum(said[i] == core[i][2] for i in places)) for said in judged.values()]
        rows.append([kind, str(len(places)), *right])
    return rows


def _blow_ups() -> None:
    """Every text that makes a careless grader run for ever, at the default limit."""
    rows = []
    with Scorer(1, Rules(5.0), kinds=("math",)) as scorer:
        scorer.wait_until_ready()
        pids = [worker._process.pid for worker in scorer._workers]
        for name, text in math_cases.BLOW_UPS.items():
            start = time.perf_counter()
            (verdict,) = scorer.score([math_submission(text, "3+2x")])
            seconds = time.perf_counter() - start
            rows.append([name, verdict.reason, f"{seconds:.2f}"])
        is_intact = pids == [worker._process.pid for worker in scorer._workers]
    slowest = max(float(r[2]) for r in rows)
    print(f"\n{len(rows)} blow-up texts: slowest {slowest:.2f} s, worker intact: {is_intact}\n")
    print(table(["text", "reason", "seconds"], [r for r in rows if float(r[2]) > 0.5]) + "\n")


# --- attacks --------------------------------------------------------------------------------------


def run_attacks() -> None:
    print(header("Graders: attacks", "python benchmarks/rewards.py attacks", ()))
    os.environ["SECRET_TOKEN"] = attacks.ENVIRONMENT_SECRET
    tiers = ("namespaces", "landlock", "rlimits")
    found: dict[str, list[str]] = {}
    for tier in tiers:
        with tempfile.TemporaryDirectory() as folder:
            Path(folder).chmod(0o711)
            _attack_tier(tier, Path(folder), found)
    rows = [[name, *outcomes] for name, outcomes in found.items()]
    print(table(["attack: what it tries", *tiers], rows) + "\n")
    for i, tier in enumerate(tiers, start=1):
        worked = sum("**" in r[i] for r in rows)
        print(f"- {tier}: {worked} of {len(rows)} worked")


def _attack_tier(tier: Any, folder: Path, found: dict[str, list[str]]) -> None:
    rules = Rules(sandbox=tier, test_timeout_s=2.0, program_timeout_s=4.0)
    with Scorer(1, rules, kinds=("code",)) as scorer:
        for i, name in enumerate(attacks.NAMES):
            with attacks.world(folder / str(i)) as target:
                (attack,) = (a for a in attacks.attacks(target) if a.name == name)
                (verdict,) = scorer.score([code_submission(attack.program, attack.answer)])
                harm = target.harm()
                left = attacks.wait_for_no_survivors(2.0)
                for pid in left:
                    with contextlib.suppress(ProcessLookupError, PermissionError):
                        os.kill(pid, signal.SIGKILL)
            said = verdict.reason
            if verdict.reward > 0:
                said = "**paid**"
            if harm or left:
                said += f" **{'; '.join([*harm, *(['a process is left'] if left else [])])}**"
            found.setdefault(f"{name}: {attack.tries}", []).append(said)


# --- public data ----------------------------------------------------------------------------------


def read_lines(path: Path) -> list[dict[str, Any]]:
    data = path.read_bytes()
    data = gzip.decompress(data) if path.suffix == ".gz" else data
    return [json.loads(line) for line in data.splitlines() if line.strip()]


def math_golds(data: Path) -> Iterator[tuple[str, Any]]:
    for name, file, field in (
        ("AIME 2024", "aime24/test.jsonl", "answer"),
        ("AIME 2025", "aime25/test.jsonl", "answer"),
        ("AMC 2023", "amc23/test.jsonl", "answer"),
        ("MATH-500", "math500/test.jsonl", "answer"),
        ("OlympiadBench", "olympiadbench/test.jsonl", "final_answer"),
        ("GSM8K test", "gsm8k/test.jsonl", "answer"),
        ("GSM8K train", "gsm8k/train_500.jsonl", "answer"),
        ("MATH train", "math_train/train_1000.jsonl", "answer"),
    ):
        for record in read_lines(data / file):
            yield name, record[field]
    for record in json.loads((data / "aime_train_1983_2023/train.json").read_text()):
        yield "AIME 1983-2023", record["answer"]


def as_response(gold: Any) -> str:
    text = str(gold[0] if isinstance(gold, list) else gold).rpartition("####")[2].strip()
    return rf"Therefore \boxed{{{text}}}."


def with_another_digit(text: str, rng: random.Random) -> str:
    """The text with one of its digits changed; itself if it has none."""
    places = [i for i, character in enumerate(text) if character in "0123456789"]
    if not places:
        return text
    i = rng.choice(places)
    return f"{text[:i]}{(int(text[i]) + rng.randint(1, 9)) % 10}{text[i + 1 :]}"


def reference_solutions(data: Path) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(set, program, problem)."""
    for problem in read_lines(data / "humaneval/HumanEval.jsonl.gz"):
        yield "HumanEval", problem["prompt"] + problem["canonical_solution"], problem
    for file in ("test_11_260", "train_601_700"):
        for problem in read_lines(data / f"mbpp/{file}.jsonl"):
            yield "MBPP", problem["code"], problem


class _Mutant(ast.NodeTransformer):
    """Every returned or printed value of a program becomes another one."""

    def visit_Return(self, node: ast.Return) -> ast.Return:
        value = node.value or ast.Constant(None)
        return ast.Return(ast.Tuple([ast.Constant("mutant"), value], ast.Load()))


def mutate(program: str) -> str:
    """A wrong program; where nothing is returned, an empty one."""
    tree = _Mutant().visit(ast.parse(program.replace("\r\n", "\n")))
    return ast.unparse(ast.fix_missing_locations(tree))


def public_data(data: Path) -> None:
    print(header("Graders: public data", "python benchmarks/rewards.py data DATA", PACKAGES))
    golds = list(math_golds(data))
    with Scorer(2, Rules(5.0), kinds=("math",)) as scorer:
        verdicts = scorer.score([math_submission(as_response(gold), gold) for _, gold in golds])
        print("golds as answers to themselves:\n")
        _print_data([name for name, _ in golds], verdicts, [gold for _, gold in golds], "match")
        rng = random.Random(0)
        pairs = [(name, g, with_another_digit(as_response(g), rng)) for name, g in golds]
        pairs = [(name, g, said) for name, g, said in pairs if said != as_response(g)]
        verdicts = scorer.score([math_submission(said, gold) for _, gold, said in pairs])
    print("the same with one digit changed:\n")
    _print_data([name for name, *_ in pairs], verdicts, [said for *_, said in pairs], "")
    solutions = list(reference_solutions(data))
    names = [name for name, *_ in solutions]
    labels = [problem["task_id"] for *_, problem in solutions]
    with Scorer(2, Rules(), kinds=("code",)) as scorer:
        print(f"programs: {scorer.sandbox}\n")
        for kind, change, wanted in (("reference", str, "match"), ("mutated", mutate, "")):
            submissions = [code_submission(change(code), problem) for _, code, problem in solutions]
            start = time.perf_counter()
            verdicts = scorer.score(submissions)
            seconds = time.perf_counter() - start
            print(f"{kind} solutions, {seconds:.0f} s with 2 workers:\n")
            _print_data(names, verdicts, labels, wanted)


def _print_data(names, verdicts: Sequence[Verdict], labels, wanted: str) -> None:
    rows, exceptions = [], []
    for name in dict.fromkeys(names):
        places = [i for i, n in enumerate(names) if n == name]
        passed = [i for i in places if verdicts[i].is_right]
        rows.append([name, str(len(places)), str(len(passed))])
        odd = [i for i in places if verdicts[i].is_right != (wanted == "match")]
        exceptions += [f"{name} `{labels[i]}`: {verdicts[i].reason}" for i in odd]
    print(table(["set", "number", "right"], rows) + "\n")
    print("exceptions: " + ("; ".join(exceptions) or "none") + "\n")


# --- the main job ---------------------------------------------------------------------------------

_TIMELINE = """
import json, sys, time
from aspo_jax import rollout, steps, train
from aspo_jax.rewards.pool import scorer as pool
events = []
note = lambda what: events.append((time.perf_counter(), what))
submit, judged, results = pool.Grading.submit, pool._Round.judged, pool.Grading.results
def noted(function, what):
    def call(*a, **k):
        note(what)
        return function(*a, **k)
    return call
pool.Grading.submit = noted(submit, "submit")
pool._Round.judged = noted(judged, "verdict")
pool.Grading.results = noted(results, "wait")
rollout.draw = noted(rollout.draw, "draw")
update = train.update
def observed(run, state, minibatches):
    note("update")
    return update(run, state, minibatches)
train.update = observed
code = train.main(sys.argv[2:])
json.dump(events, open(sys.argv[1], "w"))
sys.exit(code)
"""


def timeline(settings: Sequence[str]) -> None:
    print(header("Sampling and grading overlap", "python benchmarks/rewards.py timeline", ("jax",)))
    with tempfile.TemporaryDirectory() as folder:
        out = f"{folder}/events.json"
        arguments = [
            f"Run.folder={folder}/run",
            "Train.iterations=6",
            "Sampler.slots=128",
            *settings,
        ]
        command = [sys.executable, "-c", _TIMELINE, out]
        for setting in arguments:
            command += ["--set", setting]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        events = json.loads(Path(out).read_text())
    rows, current = [], []
    for when, what in events:
        if what != "update":
            current.append((when, what))
            continue
        rows.append(_span(current))
        current = []
    print("Seconds since sampling began; 512 samples in 4 batches of 128 slots.\n")
    head = ["iteration", "samples", "first submitted", "first verdict", "sampling ended"]
    head += ["last verdict", "judged while sampling"]
    print(table(head, [[str(i), *r] for i, r in enumerate(rows)]) + "\n")


def _span(events: list[tuple[float, str]]) -> list[str]:
    """One rollout, from the first decoded position to the last verdict."""
    start = max(when for when, what in events if what == "draw")
    last = [(when - start, what) for when, what in events if when >= start]
    asked = [when for when, what in last if what == "submit"]
    waited = next(when for when, what in last if what == "wait")
    verdicts = [when for when, what in last if what == "verdict"]
    early = sum(when < waited for when in verdicts)
    times = (asked[0], min(verdicts), waited, max(verdicts))
    return [str(len(asked)), *(f"{when:.3f}" for when in times), str(early)]


FAULTY = """
import os, sys, time, zlib
from aspo_jax.rewards.graders import GRADERS
from aspo_jax.rewards.pool import worker
def grade_by(grader):
    def grade(s):
        if zlib.crc32(s.identity.encode()) % 1000 < int(os.environ.get("FAULTS", "10")):
            kind = zlib.crc32(s.identity.encode()) % 3
            if kind == 0: time.sleep(1000)
            if kind == 1: os._exit(1)
            os.write(1, b"x" * 10**6); raise RuntimeError
        return grader(s)
    return grade
for kind, real in GRADERS.items():
    GRADERS[kind] = real._replace(open=lambda rules, real=real: grade_by(real.open(rules)))
sys.exit(worker.main(*sys.argv[1:]))
"""
_FAULTY_TRAIN = """
import json, sys, zlib
from aspo_jax import build, rollout, steps, train
from aspo_jax.rewards import Scorer
from aspo_jax.rewards.pool import scorer as pool
if sys.argv[2] != "none":
    pool.WORKER_COMMAND = (sys.executable, "-P", sys.argv[2])
    Scorer.__init__.__defaults__ = (*Scorer.__init__.__defaults__[:-1], pool.WORKER_COMMAND)
seen = []
collect = rollout.collect
def noted(*a, **k):
    result = collect(*a, **k)
    seen.append([[s.text, s.verdict.reward, s.verdict.reason] for s in result.samples])
    return result
steps.collect = noted
code = train.main(sys.argv[3:])
json.dump(seen, open(sys.argv[1], "w"))
sys.exit(code)
"""


def faults(settings: Sequence[str]) -> None:
    """The first iteration's samples are the same in both runs, and so must their verdicts be."""
    print(header("One grader in a hundred fails", "python benchmarks/rewards.py faults", ("jax",)))
    runs = {}
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, "faulty.py")
        script.write_text(FAULTY)
        for name, worker in (("sound", "none"), ("faulty", str(script))):
            out = f"{folder}/{name}.json"
            command = [sys.executable, "-c", _FAULTY_TRAIN, out, worker]
            values = [f"Run.folder={folder}/{name}", "Train.iterations=8", "Reward.timeout_s=2.0"]
            for setting in [*values, *settings]:
                command += ["--set", setting]
            start = time.perf_counter()
            done = subprocess.run(command, capture_output=True)
            seconds = time.perf_counter() - start
            runs[name] = json.loads(Path(out).read_text())
            print(f"- {name}: exit status {done.returncode}, {seconds:.0f} s")
    sound, faulty = runs["sound"][0], runs["faulty"][0]
    reasons = Counter(reason for *_, reason in faulty)
    odd = [(a, b) for a, b in zip(sound, faulty, strict=True) if a != b]
    same_text = sum(a[0] == b[0] for a, b in zip(sound, faulty, strict=True))
    failed = sum(b[2] in ("timeout", "crash") for _, b in odd)
    print(f"- first iteration: {len(sound)} samples, {same_text} with equal texts; {dict(reasons)}")
    print(f"- verdicts that differ: {len(odd)}, of which timeout or crash: {failed}")
    every = Counter(reason for step in runs["faulty"] for *_, reason in step)
    print(f"- all iterations: {dict(every)}\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    of_speed = commands.add_parser("speed")
    of_speed.add_argument("--answers", type=int, default=400)
    of_speed.add_argument("--programs", type=int, default=80)
    commands.add_parser("cases")
    commands.add_parser("attacks")
    commands.add_parser("data").add_argument("data", type=Path)
    for name in ("timeline", "faults"):
        commands.add_parser(name).add_argument("--set", action="append", default=[])
    a = parser.parse_args()
    if a.command == "speed":
        speed(a.answers, a.programs)
    elif a.command == "data":
        public_data(a.data)
    elif a.command in ("timeline", "faults"):
        {"timeline": timeline, "faults": faults}[a.command](a.set)
    else:
        {"cases": cases, "attacks": run_attacks}[a.command]()


if __name__ == "__main__":
    main()
