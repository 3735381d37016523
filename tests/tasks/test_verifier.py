import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from vespo_lightning.tasks import math_worker
from vespo_lightning.tasks.base import Problem, Verdict
from vespo_lightning.tasks.verifier import AnswerVerifier

ENDLESS = "\\boxed{9^{9^{9^{9}}}}"


@pytest.fixture(scope="module")
def verifier():
    verifier = AnswerVerifier(timeout_s=20.0)
    yield verifier
    verifier.close()


def verify(verifier: AnswerVerifier, *pairs: tuple[str, str]) -> list[Verdict]:
    problems = [Problem(f"own/{i}", "?", reference) for i, (reference, _) in enumerate(pairs)]
    return verifier.verify(problems, [response for _, response in pairs])


@pytest.mark.parametrize(
    ("reference", "response", "reward"),
    [
        ("\\frac{1}{2}", "\\boxed{0.5}", 1.0),
        ("\\frac{1}{2}", "#### 1/2", 1.0),
        ("2\\sqrt{2}", "The answer is $\\sqrt{8}$.", 1.0),
        ("(x+1)^2", "\\boxed{x^2 + 2x + 1}", 1.0),
        ("0.6666666667", "\\boxed{\\frac{2}{3}}", 1.0),
        ("0.2", "The answer is 20%.", 1.0),
        ("\\text{Monday}", "The answer is Monday.", 1.0),
        ("\\frac{1}{2}", "\\boxed{0.51}", 0.0),
        ("0.6666666667", "\\boxed{0.67}", 0.0),
        ("(1,2)", "\\boxed{[1,2]}", 0.0),
        ("3", "The answer is 3 and a half", 0.0),
        ("18", "#### 17, 18", 0.0),
        ("18", "#### 17 or 18", 0.0),
        ("1", "\\boxed{1x}", 0.0),
        ("20\\%", "\\boxed{0.2}", 1.0),
        ("\\frac{1}{2}", "The answer is:\n\\[ 0.5 \\]", 1.0),
        ("12x", "\\boxed{12 $x$}", 1.0),
        ("1", "\\boxed{\\$\\$}", 0.0),
        ("18", "\\boxed{}", 0.0),
        ("18", "\\boxed{\\frac{}", 0.0),
        ("18", "no number", 0.0),
        ("}", "\\boxed{x}", 0.0),
    ],
)
def test_formulas_are_judged_by_math_verify(verifier, reference, response, reward):
    assert verify(verifier, (reference, response)) == [Verdict(reward)]


def test_ordinary_answers_need_no_worker():
    verifier = AnswerVerifier()
    verdicts = verify(verifier, ("18", "#### 18"), ("18", "#### 19"), ("3,450", "\\boxed{3450.0}"), ("18", ""))
    assert [verdict.reward for verdict in verdicts] == [1.0, 0.0, 1.0, 0.0]
    assert verifier._process is None


def test_overrun_is_killed_and_the_batch_goes_on():
    verifier = AnswerVerifier(timeout_s=3.0)
    assert verify(verifier, ("x+1", "\\boxed{1+x}"))[0].reward == 1.0
    first = verifier._process
    start = time.perf_counter()
    verdicts = verify(verifier, ("3", ENDLESS), ("3", ENDLESS), ("x+1", "\\boxed{1+x}"), ("3", "\\boxed{3}"))
    assert verdicts[0] == verdicts[1] == Verdict(0.0, "timed out after 3 s")
    assert [verdict.reward for verdict in verdicts[2:]] == [1.0, 1.0]
    assert verifier.timeouts == 1  # equal answers are judged once
    assert first.poll() is not None and verifier._process.pid != first.pid
    assert time.perf_counter() - start < 30
    last = verifier._process
    verifier.close()
    verifier.close()
    assert last.poll() is not None


def test_a_worker_that_dies_is_an_error_and_replaced():
    verifier = AnswerVerifier(timeout_s=60.0)
    verify(verifier, ("x+1", "\\boxed{1+x}"))
    threading.Timer(0.5, verifier._process.kill).start()
    died, after = verify(verifier, ("3", ENDLESS), ("x+1", "\\boxed{1+x}"))
    assert died.reward == 0.0 and died.error.startswith("the answer checker died")
    assert after == Verdict(1.0)
    verifier._process.kill()  # between two answers: nobody's fault
    verifier._process.wait()
    assert verify(verifier, ("x+2", "\\boxed{2+x}")) == [Verdict(1.0)]
    assert verifier.timeouts == 0
    verifier.close()


def test_an_interrupt_leaves_no_answer_behind(monkeypatch):
    verifier = AnswerVerifier(timeout_s=20.0)
    verify(verifier, ("x+1", "\\boxed{1+x}"))

    def interrupted(timeout):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(verifier._connection, "poll", interrupted)
        verify(verifier, ("x+1", "\\boxed{1+x}"))  # its "equal" is never fetched
    assert verify(verifier, ("x+1", "\\boxed{x+2}")) == [Verdict(0.0)]
    verifier.close()


def test_any_thread_may_ask(verifier):
    rewards = {}

    def ask(number):
        pairs = [(f"x+{i}", f"\\boxed{{{i}+x}}") for i in range(number, number + 6)]
        pairs += [(f"x+{number}", f"\\boxed{{x+{number + 1}-0}}")]
        rewards[number] = [verdict.reward for verdict in verify(verifier, *pairs)]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert rewards == {number: [1.0] * 6 + [0.0] for number in range(4)}


def test_a_forked_process_gets_a_worker_of_its_own(verifier):
    verify(verifier, ("x+1", "\\boxed{1+x}"))
    ours = verifier._process.pid
    with verifier._lock:  # as when another thread is asking at the moment of the fork
        child = os.fork()
        if child == 0:
            equal = verifier.judge_in_worker("x+1", "1+x").reward == 1.0
            own = verifier._process.pid != ours
            verifier.close()
            os._exit(0 if equal and own else 1)
    deadline = time.monotonic() + 60
    while (status := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < deadline:
        time.sleep(0.05)
    if status[0] == 0:
        os.kill(child, 9)
        os.waitpid(child, 0)
    assert status[0] == child and os.waitstatus_to_exitcode(status[1]) == 0
    assert verify(verifier, ("x+2", "\\boxed{2+x}")) == [Verdict(1.0)]


def test_the_worker_imports_no_torch(verifier):
    worker = Path(math_worker.__file__)
    program = f"import runpy, sys; runpy.run_path({str(worker)!r}); print(*sorted(sys.modules))"
    listing = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=True)
    modules = {name.partition(".")[0] for name in listing.stdout.split()}
    assert "math_verify" in modules
    assert not modules & {"torch", "transformers", "lightning", "datasets", "vespo_lightning"}
    maps = Path(f"/proc/{os.getpid()}/maps")
    if maps.exists():
        assert torch.__version__ and "libtorch" in maps.read_text()
        verify(verifier, ("x+1", "\\boxed{1+x}"))
        assert "libtorch" not in Path(f"/proc/{verifier._process.pid}/maps").read_text()


def test_the_worker_ends_with_its_parent():
    program = (
        "import os\n"
        "from vespo_lightning.tasks.verifier import AnswerVerifier\n"
        "verifier = AnswerVerifier()\n"
        "verifier.judge_in_worker('x+1', '1+x')\n"
        "print(verifier._process.pid, flush=True)\n"
        "os._exit(0)\n"  # without any cleaning up
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    pid = int(run.stdout)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and _alive(pid):
        time.sleep(0.05)
    assert not _alive(pid)
    assert run.stderr == ""


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # an orphan that ended may wait for a reaper
    stat = Path(f"/proc/{pid}/stat")
    return not (stat.exists() and stat.read_text().rpartition(")")[2].split()[0] == "Z")
