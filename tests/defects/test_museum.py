"""The museum: defects that other stacks shipped, each put into our code, where a guard or a named truth must see it.

A specimen patches a function of the package (`inject`) and names what sees it: `watched_run`, two iterations of a tiny
policy optimization under all guards of the stage, or a truth of `truths.py`. The check passes on the code as it stands
and fails on the spoiled one, with the message that the defect deserves. So no check is always red, none always green,
and a guard that goes blind is noticed. Each specimen's source says who had the defect.
"""

import pytest
import specimens_host
import specimens_mathematics
import specimens_rollout
from harness import Patches

from rlhf_jax.errors import UserError

SPECIMENS = [*specimens_rollout.SPECIMENS, *specimens_mathematics.SPECIMENS, *specimens_host.SPECIMENS]


@pytest.mark.parametrize("specimen", SPECIMENS, ids=lambda specimen: specimen.name)
def test_defect_is_seen(specimen, monkeypatch):
    specimen.check()
    specimen.inject(Patches(monkeypatch))
    with pytest.raises((UserError, AssertionError), match=specimen.sign):
        specimen.check()
