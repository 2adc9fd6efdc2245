"""Runs the command as `python -m rlhf_jax.main` would, and notes which files it writes and which rows it loads.

    python audited_main.py NOTES --config=... --workdir=...

NOTES gets one JSON object a line: {"write": path} for a file or folder that Python creates, renames or removes, and
{"rows": rows of a batch, "loaded": the row numbers this process loaded}. Writes of compiled code (Orbax) go unseen.
"""

import json
import os
import sys

NOTES = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.link", "os.symlink"}


def note(**fields) -> None:
    os.write(NOTES, (json.dumps(fields) + "\n").encode())


def watch(event: str, arguments: tuple) -> None:
    if event == "open":
        path, _, flags = arguments
        if isinstance(path, str) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_TRUNC):
            note(write=path)
    elif event in CHANGES:
        note(write=os.fspath(arguments[0]))


def main() -> int:
    from rlhf_jax import distributed
    from rlhf_jax.distributed import sharding

    place_batch = sharding.place_batch

    def watched(rows, load, mesh):
        def noted(mine):
            note(rows=rows, loaded=mine.tolist())
            return load(mine)

        return place_batch(rows, noted, mesh)

    # Before any stage is imported, so that each gets the watched one.
    sharding.place_batch = distributed.place_batch = watched
    from rlhf_jax.main import main as command

    sys.addaudithook(watch)
    return command(["rlhf_jax.main", *sys.argv[2:]])


if __name__ == "__main__":
    sys.exit(main())
