"""Runs the command as `python -m rlhf_jax.main` would, with a folder in place of Google Cloud Storage.

    python bucket_main.py FOLDER --workdir=gs://BUCKET/RUN ...

gs://BUCKET/RUN is FOLDER/BUCKET/RUN, for the mirror (through fsspec) and for Orbax.
"""

import sys

import fsspec


def main() -> int:
    from rlhf_jax.distributed import storage
    from rlhf_jax.main import main as command

    storage.open_bucket = lambda url: fsspec.filesystem("file", auto_mkdir=True)
    mirror = storage.Mirror

    def in_folder(files, url, folder, writes):
        return mirror(files, f"{sys.argv[1]}/{url.removeprefix('gs://')}", folder, writes)

    storage.Mirror = in_folder  # type: ignore[assignment,misc]
    return command(["rlhf_jax.main", *sys.argv[2:]])


if __name__ == "__main__":
    sys.exit(main())
