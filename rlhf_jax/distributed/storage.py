"""A work directory in a bucket, for machines that share no disk: a folder of this machine mirrors it.

All code reads and writes local files. Before each barrier process 0 pushes what it wrote, behind it the others pull it:
so a barrier promises what it does on a shared disk. Process 0 also pushes before a checkpoint is complete, and every
minute, for what is long between two barriers. A manifest in the bucket, written last, names every file with its hash:
what it does not name is not there. What Orbax writes goes straight to the bucket (`remote`).
"""

import concurrent.futures
import contextlib
import dataclasses
import fcntl
import hashlib
import importlib.util
import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import fsspec
from etils import epath

from rlhf_jax.errors import UserError

MANIFEST, MARKER = "mirror.json", ".mirror"
APART = ("compiled", MARKER)  # of each machine alone
UNFINISHED = (".tmp", ".new")  # how names end of what is still being written
TOGETHER = 16  # files on their way at a time
EVERY = 60.0  # seconds between two pushes where no barrier comes
TICK = 100_000_000  # nanoseconds in which a file may change again without a sign of it

_claimed: list[int] = []  # descriptors that hold the locks of this process's folders


@dataclasses.dataclass(frozen=True)
class Entry:
    """What the manifest says of a file."""

    size: int
    sha256: str
    mode: int


class Mirror:
    """A bucket's folder and the local one that mirrors it."""

    def __init__(self, files: Any, url: str, folder: Path, writes: bool = True):
        """`files` is the fsspec file system of `url`; without `writes` nothing is ever pushed."""
        self._files, self._url, self.folder, self._writes = files, url.rstrip("/"), folder, writes
        self._manifest: dict[str, Entry] = {}  # of the newest push or pull
        self._hashes: dict[str, tuple[tuple[int, int, int], str]] = {}  # name -> (how the file looked, its hash)
        self._lock = threading.Lock()
        self._lost = False

    def remote(self, path: Path) -> epath.Path:
        """The place in the bucket of a path under the local folder."""
        return epath.Path(self._url) / path.relative_to(self.folder)

    def begin(self) -> None:
        """Checks that the bucket can be read and written, and makes the local folder what the bucket holds.

        Raises:
          UserError: it cannot, or the folder in the bucket is of something else.
        """
        with self._reached():
            manifest = self._read()
            held = [] if manifest is not None else self._listed()
            if held:
                raise UserError(
                    f"{self._url} holds {held[0]} but no {MANIFEST}: give a --workdir that is new, or a run's"
                )
            self._write(manifest or {})  # whether it may be written shows now
        self.pull()

    def keep_pushing(self) -> None:
        """From here on a thread pushes every minute; what goes wrong there, the next barrier's push says."""

        def follow() -> None:
            while True:
                time.sleep(EVERY)
                with contextlib.suppress(UserError):
                    self.push()

        if self._writes:
            threading.Thread(target=follow, name="mirror", daemon=True).start()

    def push(self) -> None:
        """Brings the bucket up to what the local folder holds: changed files, then the manifest, then deletions."""
        if not self._writes:
            return
        with self._lock, self._reached():
            looked = {name: self._look(name) for name in self._names()}
            entries = {name: entry for name, entry in looked.items() if entry is not None}
            changed = [name for name, entry in entries.items() if entry != self._manifest.get(name)]
            gone = self._manifest.keys() - entries.keys()
            if not changed and not gone:
                return
            _each(self._put, changed)
            self._write(entries)
            self._manifest = entries
            _each(self._remove, gone)

    def pull(self) -> None:
        """Brings the local folder up to what the bucket holds."""
        with self._lock, self._reached():
            manifest = self._read() or {}
            before = self._manifest or dict.fromkeys(self._names())  # at first: what an earlier run left here
            _each(self._get, [item for item in manifest.items() if self._look(item[0]) != item[1]])
            for name in before.keys() - manifest.keys():
                self._delete(self.folder / name)
            self._manifest = manifest

    @property
    def lost(self) -> bool:
        """Whether the bucket could not be reached when last tried."""
        return self._lost

    # --- the local folder -----------------------------------------------------------------------------------------

    def _names(self) -> list[str]:
        """The files that are mirrored, as they were at one moment: their names did not change while they were read."""
        last: list[str] | None = None
        while True:
            names = sorted(self._walk(""))
            if names == last:
                return names
            last = names

    def _walk(self, below: str) -> Iterator[str]:
        with contextlib.suppress(FileNotFoundError), os.scandir(self.folder / below) as found:
            for item in found:
                name = f"{below}/{item.name}" if below else item.name
                if name in APART or name.endswith(UNFINISHED):
                    continue
                if item.is_dir(follow_symlinks=False):
                    yield from self._walk(name)
                elif item.is_file():
                    yield name

    def _look(self, name: str) -> Entry | None:
        """What a file is now; None if it is not there."""
        path, now = self.folder / name, time.time_ns()
        try:
            stat = path.stat()
            looks = (stat.st_size, stat.st_mtime_ns, stat.st_ino)
            known, sha256 = self._hashes.get(name, (None, ""))
            if looks != known:
                with path.open("rb") as file:
                    sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        except FileNotFoundError:
            self._hashes.pop(name, None)
            return None
        if now - stat.st_mtime_ns > TICK:
            self._hashes[name] = looks, sha256
        return Entry(stat.st_size, sha256, stat.st_mode & 0o777)

    def _delete(self, path: Path) -> None:
        """Removes a file, and the folders that are empty without it."""
        path.unlink(missing_ok=True)
        for folder in path.parents:
            if folder == self.folder:
                break
            try:
                folder.rmdir()
            except OSError:  # holds something
                break

    # --- the bucket -----------------------------------------------------------------------------------------------

    def _read(self) -> dict[str, Entry] | None:
        """The manifest; None where there is none yet."""
        try:
            content = self._files.cat_file(f"{self._url}/{MANIFEST}")
        except FileNotFoundError:
            return None
        return {name: Entry(*fields) for name, fields in json.loads(content).items()}

    def _write(self, manifest: dict[str, Entry]) -> None:
        if self._writes:
            content = {name: dataclasses.astuple(entry) for name, entry in sorted(manifest.items())}
            self._files.pipe_file(f"{self._url}/{MANIFEST}", json.dumps(content).encode())

    def _get(self, item: tuple[str, Entry]) -> None:
        """Fetches a file; one that process 0 has removed by now is left out."""
        name, entry = item
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        fetched = path.with_name(f"{path.name}.tmp")
        fetched.unlink(missing_ok=True)
        fetched.touch(entry.mode)  # a file that its owner alone may read is that from the start
        try:
            self._files.get_file(f"{self._url}/{name}", str(fetched))
        except FileNotFoundError:
            fetched.unlink()
            return
        fetched.chmod(entry.mode)
        os.replace(fetched, path)  # an array that is mapped from the old one stays whole

    def _put(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):  # gone by now: the next push says so
            self._files.put_file(str(self.folder / name), f"{self._url}/{name}")

    def _remove(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._files.rm_file(f"{self._url}/{name}")

    def _listed(self) -> list[str]:
        """What is in the folder at all, but its own name."""
        try:
            found = self._files.ls(self._url, detail=False)
        except FileNotFoundError:
            return []
        return [name for name in found if not self._url.endswith(name.strip("/"))]

    @contextlib.contextmanager
    def _reached(self) -> Iterator[None]:
        """Around what needs the bucket: whatever goes wrong with it is one line."""
        try:
            yield
            self._lost = False
        except UserError:
            raise
        except Exception as error:
            self._lost = True
            raise UserError(
                f"{self._url} cannot be used ({_first_line(error)}): see that the bucket is there and that this "
                "machine's account may read and write it, then run the same command again"
            ) from error


def _each(work: Callable[[Any], None], items: Iterable[Any]) -> None:
    with concurrent.futures.ThreadPoolExecutor(TOGETHER) as pool:
        for done in [pool.submit(work, item) for item in items]:
            done.result()


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


# --- this process's work directory ------------------------------------------------------------------------------------

_mirror: Mirror | None = None


def local_folder(workdir: str, local_dir: str = "") -> Path:
    """Where a run's files are on this machine: `workdir` itself, or a folder for one in a bucket.

    That folder is `local_dir`, by default one of ~/.cache/rlhf_jax. Only one process uses it: where it is taken, the
    process gets the same name with .1, .2 and so on behind.

    Raises:
      UserError: the url is not of Google Cloud Storage, or `local_dir` holds other files.
    """
    scheme, separator, rest = workdir.partition("://")
    if not separator:
        if local_dir:
            raise UserError(f"--local_dir is for a --workdir in a bucket, and {workdir} is none: leave it out")
        return Path(workdir).expanduser().absolute()
    if scheme != "gs" or not rest.split("/")[0]:
        raise UserError(f"--workdir={workdir}: give a folder, or gs://BUCKET/FOLDER (Google Cloud Storage)")
    name = hashlib.sha256(workdir.rstrip("/").encode()).hexdigest()[:16]
    first = Path(local_dir or Path("~/.cache/rlhf_jax") / name).expanduser().absolute()
    number, folder = 0, first
    while not _claim(folder, workdir.rstrip("/")):
        number += 1
        folder = first.with_name(f"{first.name}.{number}")
    return folder


def _claim(folder: Path, url: str) -> bool:
    """Takes a folder for this process, unless another one has it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / MARKER, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror}): give --local_dir another folder") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return False
    owner = os.pread(descriptor, 4096, 0).decode()
    others = not owner and any(item.name != MARKER for item in folder.iterdir())
    if others or owner not in ("", url):
        if others:
            (folder / MARKER).unlink()
        os.close(descriptor)
        what = "holds other files, which would be removed" if others else f"is the mirror of {owner}"
        raise UserError(f"--local_dir={folder} {what}: give a new or empty folder")
    os.pwrite(descriptor, url.encode(), 0)
    _claimed.append(descriptor)
    return True


def open_bucket(url: str) -> Any:
    """The fsspec file system of a bucket.

    Raises:
      UserError: gcsfs is missing, or the bucket is not there for this machine's account.
    """
    if importlib.util.find_spec("gcsfs") is None:
        raise UserError(f"--workdir={url} needs gcsfs: pip install gcsfs (it is in the extra rlhf_jax[tpu])")
    from google.cloud import storage  # comes with gcsfs

    bucket = url.removeprefix("gs://").split("/")[0]
    try:
        storage.Client().get_bucket(bucket)  # Orbax asks for it too, whatever else the account may do
    except Exception as error:
        raise UserError(
            f"--workdir={url}: bucket {bucket} cannot be used ({_first_line(error)}): see that it is there, and that "
            "this machine's account has the roles storage.objectUser and storage.legacyBucketReader on it"
        ) from error
    # Other processes write too. Orbax's own file system, made later, takes this up as well.
    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
    return fsspec.filesystem("gcs")


def connect(workdir: str, folder: Path, writes: bool) -> None:
    """Makes `folder` (of `local_folder`) the mirror of `workdir`, where that is in a bucket."""
    global _mirror
    _mirror = Mirror(open_bucket(workdir), workdir, folder, writes) if "://" in workdir else None


def mirror() -> Mirror | None:
    """This process's mirror, where its work directory is in a bucket."""
    return _mirror


def remote(path: Path) -> epath.Path:
    """Where Orbax keeps what belongs at `path`: in the bucket, if the work directory mirrors one."""
    inside = _mirror is not None and path.is_relative_to(_mirror.folder)
    return _mirror.remote(path) if inside else epath.Path(path.absolute())  # type: ignore[union-attr]


def push() -> None:
    """Brings the bucket up to what process 0 wrote. Only process 0 calls it; without a bucket it does nothing."""
    if _mirror is not None:
        _mirror.push()
