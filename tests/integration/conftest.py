"""The tiny job, run once for all of pytest's workers; tests copy from it what they need."""

import os
import sysconfig
from pathlib import Path

import pytest
from filelock import FileLock
from tiny import Command, Finished, write_config


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    """A folder that all workers of this run of pytest see."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def source(shared):
    """Sixty small files of the standard library."""
    folder = shared / "source"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            folder.mkdir()
            candidates = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
            candidates = [path for path in candidates if 3_000 < path.stat().st_size < 15_000]
            for path in candidates[:60]:
                (folder / path.name).write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def config_file(source, tmp_path_factory):
    """The tiny job, every stage."""
    return write_config(tmp_path_factory.mktemp("config") / "tiny_job.py", source)


@pytest.fixture(scope="session")
def finished(config_file, shared):
    """(work directory, the command) of the tiny job without a cut, on one device; every compilation is logged."""
    workdir, console = shared / "finished" / "work", shared / "finished" / "console"
    with FileLock(f"{workdir.parent}.lock"):
        if not console.exists():
            workdir.parent.mkdir(exist_ok=True)
            done = Command(config_file, workdir, environment={"JAX_LOG_COMPILES": "1"}, merged=True).wait()
            assert done.status == 0, done.stdout[-3000:]
            console.write_text(done.stdout)
    return workdir, Finished(0, console.read_text(), "")
