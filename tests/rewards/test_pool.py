"""The pool: no text stalls it, harms its neighbours, or leaves a process behind."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from aspo_jax.rewards import REASONS, RewardError, Rules, Scorer, Submission, Verdict

TIMEOUT = Verdict(0.0, "timeout")  # wrong, and not masked
CRASH = Verdict(0.0, "crash", is_valid=False)

# The real worker with a grader that does what the text says.
OBEDIENT = """
    import ctypes, os, signal, subprocess, sys, time
    from aspo_jax.rewards import exact, graders
    from aspo_jax.rewards.pool import worker

    def grade(s):
        text, answer, is_finished = s.text, s.answer, s.is_finished
        if text == "hang": time.sleep(1e6)
        if text == "deaf": signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(1e6)
        if text == "spin":
            while True: pass
        if text == "hang in C": ctypes.PyDLL(None).sleep(1000)  # holds the interpreter's lock
        if text == "children":
            open(answer, "w").write(str(subprocess.Popen(["sleep", "1000"]).pid)); time.sleep(1e6)
        if text == "pause": time.sleep(0.3)
        if text == "exit": os._exit(3)
        if text == "segfault": ctypes.string_at(0)
        if text == "kill": os.kill(os.getpid(), signal.SIGKILL)
        if text == "raise": raise ZeroDivisionError
        if text == "recurse": grade(s)
        if text == "close": os.closerange(0, 100); time.sleep(1e6)
        if text == "print": print("[1.0, 'match', true]\\n" * 9); sys.stdout.flush()
        if text == "once" and not os.path.exists(answer): open(answer, "w").close(); os._exit(1)
        if text == "once": return exact.grade(text, text, is_finished)
        return exact.grade(text, answer, is_finished)

    limit_s = float(sys.argv[1] if sys.argv[1][0].isdigit() else sys.argv[-1])
    worker.serve({"exact": graders.each(grade)}, limit_s)
"""


def say(text, answer="right", kind="exact"):
    return Submission(kind, text, answer, True, 1)


@pytest.fixture
def obedient(tmp_path):
    script = tmp_path / "obedient.py"
    script.write_text(textwrap.dedent(OBEDIENT))
    return sys.executable, "-P", str(script)


def alive(pid):
    """Whether a process still runs; one that nobody has reaped yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def pids(scorer):
    return [worker._process.pid for worker in scorer._workers]


def wait_until(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("count", [0, 1, 2, 100, 517])
def test_verdicts_keep_their_order(workers, count):
    with Scorer(workers, Rules(30.0)) as scorer:
        for _ in range(2):
            verdicts = scorer.score([say(str(i % 7), str(i % 3)) for i in range(count)])
            assert [v.reward for v in verdicts] == [float(i % 7 == i % 3) for i in range(count)]


def test_cheap_submissions_cost_little():
    with Scorer(1, Rules(30.0)) as scorer:
        scorer.score([say("right")])
        seconds = []
        for _ in range(5):
            start = time.perf_counter()
            scorer.score([say("right")] * 512)
            seconds.append(time.perf_counter() - start)
    assert min(seconds) < 2.5  # about 0.02 on an idle machine, 0.3 on one with ten times its load


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("text", ["hang", "deaf", "spin", "hang in C", "close"])
def test_a_hanging_answer_is_the_only_one_to_time_out(obedient, workers, text):
    submissions = [say("right") for _ in range(40)]
    submissions[17] = say(text)
    with Scorer(workers, Rules(1.0), command=obedient) as scorer:
        start = time.monotonic()
        verdicts = scorer.score(submissions)
        assert time.monotonic() - start < 15
        assert len(pids(scorer)) <= workers
        # A worker that closes its pipes has ended, as far as anyone can tell.
        assert verdicts.pop(17) == (CRASH if text == "close" else TIMEOUT)
        assert set(verdicts) == {Verdict(1.0, "match")}
        assert scorer.score([say("right")]) == [Verdict(1.0, "match")]


def test_a_timeout_ends_the_children_too(obedient, tmp_path):
    note = tmp_path / "pid"
    with Scorer(1, Rules(1.0), command=obedient) as scorer:
        assert scorer.score([say("children", str(note))]) == [TIMEOUT]
    assert wait_until(lambda: not alive(int(note.read_text())))


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("text", ["exit", "segfault", "kill", "raise", "recurse"])
def test_a_crash_harms_nobody_else(obedient, workers, text):
    submissions = [say("right") for _ in range(40)]
    submissions[0] = submissions[21] = submissions[22] = say(text)
    with Scorer(workers, Rules(30.0), command=obedient) as scorer:
        verdicts = scorer.score(submissions)
    for i, verdict in enumerate(verdicts):
        assert verdict == (CRASH if i in (0, 21, 22) else Verdict(1.0, "match"))


def test_a_crash_is_tried_again_once(obedient, tmp_path):
    with Scorer(1, Rules(30.0), command=obedient) as scorer:
        verdicts = scorer.score([say("right"), say("once", str(tmp_path / "seen")), say("no")])
    assert [v.reason for v in verdicts] == ["match", "match", "mismatch"]


def test_all_kinds_of_trouble_at_once(obedient):
    texts = ["right", "hang", "exit", "wrong", "spin", "raise", "print", "right"] * 2
    reasons = {"hang": "timeout", "spin": "timeout", "exit": "crash", "raise": "crash"}
    reasons |= {"right": "match", "wrong": "mismatch", "print": "mismatch"}
    with Scorer(2, Rules(1.0), command=obedient) as scorer:
        verdicts = scorer.score([say(text) for text in texts])
    assert [v.reason for v in verdicts] == [reasons[text] for text in texts]


def test_texts_larger_than_a_pipe():
    big = "x" * 2**20
    submissions = [say(big, big), say(big, "y"), say("\ud800\0\n\u2028", "y"), say("right")]
    with Scorer(2, Rules(30.0)) as scorer:
        verdicts = scorer.score(submissions)
    assert [v.reason for v in verdicts] == ["match", "mismatch", "mismatch", "match"]


def test_a_worker_that_never_reads_times_out(tmp_path):
    script = tmp_path / "lazy.py"
    script.write_text('import time; print("ready", flush=True); time.sleep(1e6)')
    with Scorer(1, Rules(0.3), command=(sys.executable, str(script))) as scorer:
        assert scorer.score([say("x" * 2**20)]) == [TIMEOUT]


@pytest.mark.parametrize("reply", ["nonsense", "[1.0]", '["x","match",true]', '[1.0,"won",true]'])
def test_a_worker_that_talks_nonsense_is_a_crash(tmp_path, reply):
    script = tmp_path / "liar.py"
    script.write_text(
        f"import sys; print('ready', flush=True)\nfor _ in sys.stdin: print({reply!r}, flush=True)"
    )
    with Scorer(1, Rules(30.0), command=(sys.executable, str(script))) as scorer:
        assert scorer.score([say("a")]) == [CRASH]


def test_a_worker_that_cannot_start_is_an_error_and_no_verdict():
    with (
        Scorer(1, Rules(1.0), command=(sys.executable, "-c", "raise SystemExit(9)")) as scorer,
        pytest.raises(
            RewardError, match="3 grader processes in a row ended before they were ready"
        ),
    ):
        scorer.score([say("a")])


def test_a_worker_killed_while_it_starts_is_replaced(tmp_path):
    flag = tmp_path / "started_once"
    script = tmp_path / "late.py"
    script.write_text(
        "import os, pathlib, runpy, signal, sys\n"
        f"flag = pathlib.Path({str(flag)!r})\n"
        "if not flag.exists():\n"
        "    flag.touch()\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "runpy.run_module('aspo_jax.rewards.pool.worker', run_name='__main__', alter_sys=True)\n"
    )
    with Scorer(1, Rules(30.0), command=[sys.executable, "-P", str(script)]) as scorer:
        assert scorer.score([say("right")]) == [Verdict(1.0, "match")]
    assert flag.exists()


def test_workers_that_died_between_calls_are_replaced():
    with Scorer(2, Rules(30.0)) as scorer:
        scorer.score([say("right")] * 8)
        for pid in pids(scorer):
            os.kill(pid, signal.SIGKILL)
        assert scorer.score([say("right")] * 8) == [Verdict(1.0, "match")] * 8


def test_an_interrupted_call_leaves_nothing_for_the_next(obedient):
    def interrupt(*_):
        raise KeyboardInterrupt

    with Scorer(1, Rules(30.0), command=obedient) as scorer:
        scorer.score([say("right")])
        old = signal.signal(signal.SIGALRM, interrupt)
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        with pytest.raises(KeyboardInterrupt):
            scorer.score([say("right"), say("hang")])
        signal.signal(signal.SIGALRM, old)
        assert scorer.score([say("wrong")]) == [Verdict(0.0, "mismatch")]


def test_what_is_given_up_costs_no_worker_and_no_wait(obedient):
    """Verdicts can be asked for as they come; a worker finishes what it is at, and no more."""
    with Scorer(1, Rules(30.0), command=obedient) as scorer:
        scorer.score([say("right")])
        own = pids(scorer)
        with scorer.begin() as grading:
            grading.submit(0, say("right"))
            assert wait_until(lambda: grading.verdict(0) == Verdict(1.0, "match"))
            assert grading.verdict(1) is None
            grading.submit(1, say("pause", "pause"))
            assert wait_until(lambda: scorer._workers[0].owed)
            for number in range(2, 40):
                grading.submit(number, say("hang"))
            grading.give_up()
            assert [grading.verdict(n) for n in (1, 2)] == [Verdict(1.0, "match"), None]
        assert scorer.score([say("wrong")]) == [Verdict(0.0, "mismatch")]
        assert pids(scorer) == own


def test_close_leaves_no_process():
    scorer = Scorer(3, Rules(30.0))
    scorer.score([say("right")] * 9)
    left = pids(scorer)
    assert len(left) == 3 and all(map(alive, left))
    scorer.close()
    scorer.close()
    assert not any(map(alive, left))
    with pytest.raises(ValueError, match="closed"):
        scorer.score([])


@pytest.mark.parametrize("text", ["idle", "spin", "hang in C"])
def test_workers_end_with_the_trainer(obedient, tmp_path, text):
    """kill -9 of the trainer: idle workers see their input end, busy ones have an alarm."""
    trainer = f"""
import sys
from aspo_jax.rewards import Rules, Scorer, Submission
scorer = Scorer(1, Rules(1e6), command={(*obedient, "1.0")!r})  # its own limit: 1 s
scorer.score([Submission("exact", "right", "right", True, 1)])
print(scorer._workers[0]._process.pid, flush=True)
scorer.score([Submission("exact", {text!r}, "right", True, 1)])
sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", trainer], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        if process.stdout is None:
            raise RuntimeError("no pipe")
        worker = int(process.stdout.readline())
        time.sleep(0.3)
        assert alive(worker)
        process.kill()
    assert wait_until(lambda: not alive(worker))


def test_workers_ignore_ctrl_c_and_have_a_session_of_their_own():
    with Scorer(1, Rules(30.0)) as scorer:
        scorer.score([say("right")])
        (pid,) = pids(scorer)
        assert os.getsid(pid) == os.getpgid(pid) == pid != os.getsid(0)
        os.kill(pid, signal.SIGINT)
        assert scorer.score([say("right")]) == [Verdict(1.0, "match")]
        assert pids(scorer) == [pid]


def test_workers_know_no_secrets(monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    with Scorer(1, Rules(30.0)) as scorer:
        scorer.score([say("right")])
        environment = Path(f"/proc/{pids(scorer)[0]}/environ").read_bytes()
    names = {entry.partition(b"=")[0] for entry in environment.split(b"\0") if entry}
    assert names <= {b"PATH", b"LD_LIBRARY_PATH", b"PYTHONPATH"}


def test_unknown_kinds_are_refused_by_name():
    with Scorer(1, Rules(30.0)) as scorer:
        with pytest.raises(ValueError, match="did you mean countdown.*'countdown', 'exact'"):
            scorer.score([say("right"), say("a", kind="countdwon")])
        assert scorer.score([say("right")]) == [Verdict(1.0, "match")]


def test_a_scorer_with_an_unknown_grader_is_refused_by_name():
    with pytest.raises(ValueError, match="'countdwon' .did you mean countdown.*'exact', 'math'"):
        Scorer(1, Rules(), ("exact", "countdwon"))


def test_verdicts_say_whether_the_answer_is_right_and_whether_the_grader_failed():
    assert [reason for reason in REASONS if Verdict(0.5, reason).is_right] == ["match"]
    failed = [reason for reason in REASONS if Verdict(0.0, reason).is_failed]
    assert failed == ["crash", "bad_gold"]


@pytest.mark.parametrize(
    ("workers", "timeout_s", "field"), [(0, 1.0, "workers"), (1, 0.0, "timeout_s")]
)
def test_impossible_settings(workers, timeout_s, field):
    with pytest.raises(ValueError, match=f"Reward.{field} is 0"):
        Scorer(workers, Rules(timeout_s))


def test_imports_stay_light():
    heavy = "{'jax', 'numpy', 'flax', 'transformers', 'grain', 'asyncio'}"
    program = f"import sys, aspo_jax.rewards.pool.worker; sys.exit(str({heavy} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert found.stderr.strip() == "set()"
