"""Prints what loading a checkpoint holds on the host: `python measure_loading.py FOLDER` with FOLDER/small and large.

Two numbers, in bytes: the peak of memory that no file backs (RssAnon and RssShmem, sampled by a thread) while
FOLDER/large loads, less what it was before and less the parameters' own; and the parameters' own. FOLDER/small is
loaded first, so that what a process allocates once is not counted.
"""

import sys
import threading
from pathlib import Path

import jax

from rlhf_jax.models.pretrained import load_pretrained


def anonymous() -> int:
    """Bytes of this process's memory that no file backs."""
    lines = [line.split() for line in Path("/proc/self/status").read_text().splitlines()]
    kinds = {words[0]: int(words[1]) * 1024 for words in lines if words and words[0] in ("RssAnon:", "RssShmem:")}
    return kinds["RssAnon:"] + kinds["RssShmem:"]


def main(folder: Path) -> None:
    load_pretrained(folder / "small")
    before, seen, done = anonymous(), [0], threading.Event()

    def sample() -> None:
        while not done.wait(0.0005):
            seen.append(anonymous())

    thread = threading.Thread(target=sample)
    thread.start()
    _, params = load_pretrained(folder / "large")
    done.set()
    thread.join()
    own = sum(shard.data.nbytes for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards)
    print(max(seen) - before - own, own)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
