"""The tiny job, run once a session; tests copy from it what they need."""

import sysconfig
from pathlib import Path

import pytest
from tiny import Command, write_config


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    """Sixty small files of the standard library."""
    folder = tmp_path_factory.mktemp("source")
    stdlib = Path(sysconfig.get_path("stdlib"))
    candidates = [path for path in sorted(stdlib.glob("*.py")) if 3_000 < path.stat().st_size < 15_000]
    for path in candidates[:60]:
        (folder / path.name).write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def config_file(source, tmp_path_factory):
    """The tiny job, every stage."""
    return write_config(tmp_path_factory.mktemp("config") / "tiny_job.py", source)


@pytest.fixture(scope="session")
def finished(config_file, tmp_path_factory):
    """(work directory, the command) of the tiny job without a cut, on one device; every compilation is logged."""
    workdir = tmp_path_factory.mktemp("finished") / "work"
    done = Command(config_file, workdir, environment={"JAX_LOG_COMPILES": "1"}, merged=True).wait()
    assert done.status == 0, done.stdout[-3000:]
    return workdir, done
