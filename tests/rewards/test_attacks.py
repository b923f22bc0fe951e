"""One attack a test, in both tiers: it is not paid, touches nothing and leaves nothing behind."""

import os
import shutil
import sys
import time

import attacks
import pytest

from aspo_jax.rewards import RewardError, Rules, Scorer, Submission

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="sandboxes are for Linux")
TEST_S = 2.0


@pytest.fixture(scope="module", params=["namespaces", "landlock"])
def scorer(request):
    """A scorer whose programs run in one tier."""
    if request.param == "namespaces" and shutil.which("bwrap") is None:
        pytest.skip("bubblewrap is not installed: apt-get install bubblewrap")
    rules = Rules(sandbox=request.param, test_timeout_s=TEST_S, program_timeout_s=2 * TEST_S)
    try:
        scorer = Scorer(1, rules, kinds=("code",))
    except RewardError as error:
        pytest.skip(f"this machine does not offer the tier: {error}")
    with scorer:
        yield scorer


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    os.environ["SECRET_TOKEN"] = attacks.ENVIRONMENT_SECRET
    folder = tmp_path_factory.mktemp("world")
    for place in (folder, *folder.parents):  # so that only the sandbox stands in the way
        if place.is_relative_to("/tmp") and place.stat().st_uid == os.geteuid():
            place.chmod(place.stat().st_mode | 0o011)
    with attacks.world(folder / "files") as target:
        yield target
    del os.environ["SECRET_TOKEN"]


@pytest.mark.parametrize("name", attacks.NAMES)
def test_attack(scorer, target, name):
    if name == "files without a name" and not attacks.may_debug():
        pytest.skip("this root may not debug, so it sees no open files (docs/rewards.md)")
    (attack,) = (a for a in attacks.attacks(target) if a.name == name)
    text = f"```python\n{attack.program}\n```"
    start = time.monotonic()
    (verdict,) = scorer.score([Submission("code", text, attack.answer, True, 1)])
    assert verdict.reward == 0.0, attack.tries
    assert verdict.is_valid  # a wrong answer, not a failed grader
    assert time.monotonic() - start < TEST_S + 3  # the first test that is failed is the last
    assert attacks.wait_for_no_survivors(2.0) == []
    assert target.harm() == []
    assert not os.path.exists(f"/tmp/{target.folder.parent.name}")
