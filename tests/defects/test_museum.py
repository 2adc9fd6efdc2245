"""The museum: defects that other stacks shipped, each put into our code, where a guard or a named truth must see it.

A specimen patches a function of the package (`inject`) and names what sees it (`check`): `watched_run`, two iterations
of a tiny policy optimization under all guards of the stage, or a named truth. The check passes on the code as
it stands and fails on the spoiled code with the message (`sign`) that the defect deserves. So no check is always red,
none is always green, and a guard that goes blind is noticed. `source` names who had the defect: project and file or
thread, or "a slip" where none is known to us.

To add one: a function that patches, and a row in a table: `specimens_rollout.py` (what the watch sees),
`specimens_rewards.py`, `specimens_update.py`, `specimens_safety.py`, `specimens_overoptimization.py`,
`specimens_host.py` (keys, order, resume, configuration), or `specimens_privacy.py` and `specimens_private_stages.py`.
"""

from functools import cache

import pytest
import specimens_host
import specimens_overoptimization
import specimens_privacy
import specimens_private_stages
import specimens_rewards
import specimens_rollout
import specimens_safety
import specimens_update
from harness import Patches

from rlhf_jax.errors import UserError

SPECIMENS = [
    *specimens_rollout.SPECIMENS,
    *specimens_rewards.SPECIMENS,
    *specimens_update.SPECIMENS,
    *specimens_safety.SPECIMENS,
    *specimens_overoptimization.SPECIMENS,
    *specimens_host.SPECIMENS,
    *specimens_privacy.SPECIMENS,
    *specimens_private_stages.SPECIMENS,
]


@cache
def holds_of_our_code(check):
    """Runs a check before anything is spoiled; once, however many specimens share it."""
    check()


@pytest.mark.parametrize("specimen", SPECIMENS, ids=lambda specimen: specimen.name)
def test_defect_is_seen(specimen, monkeypatch):
    holds_of_our_code(specimen.check)
    specimen.inject(Patches(monkeypatch))
    with pytest.raises((UserError, AssertionError), match=specimen.sign):
        specimen.check()
