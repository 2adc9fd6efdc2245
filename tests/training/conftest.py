"""Tiny roles of policy optimization, made once for all files."""

import pytest
import tiny_ppo as tiny


@pytest.fixture(scope="session")
def full():
    return tiny.make_roles(lora=False)


@pytest.fixture(scope="session")
def adapted():
    return tiny.make_roles(lora=True)
