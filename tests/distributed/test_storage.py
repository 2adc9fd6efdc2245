"""A bucket's mirror: what process 0 writes is what the others see, and what a fresh machine finds."""

import json
import os
import sys
import types

import fsspec
import pytest

from rlhf_jax.distributed import processes, storage
from rlhf_jax.distributed.storage import MANIFEST, Mirror
from rlhf_jax.errors import UserError


class Bucket:
    """A bucket that stands in a folder: fsspec's local files, with a count of what goes over the line."""

    def __init__(self, root):
        self.url, self.sent, self.fetched = str(root / "bucket" / "run"), [], []
        self.files = fsspec.filesystem("file", auto_mkdir=True, skip_instance_cache=True)
        put, get = self.files.put_file, self.files.get_file
        self.files.put_file = lambda local, far: (self.sent.append(self.name(far)), put(local, far))
        self.files.get_file = lambda far, local: (self.fetched.append(self.name(far)), get(far, local))

    def name(self, url):
        return url.removeprefix(f"{self.url}/")

    def mirror(self, folder, writes=True):
        folder.mkdir(exist_ok=True)
        mirror = Mirror(self.files, self.url, folder, writes)
        mirror.begin()
        return mirror


@pytest.fixture
def bucket(tmp_path):
    return Bucket(tmp_path)


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def write(folder, **files):
    for name, text in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.fixture
def pair(bucket, tmp_path):
    """(process 0's folder and mirror, another's)."""
    first, other = tmp_path / "first", tmp_path / "other"
    return first, bucket.mirror(first), other, bucket.mirror(other)


def test_files_changes_and_deletions_arrive(pair, bucket):
    first, pusher, other, puller = pair
    write(first, a="1", stage__b="22", stage__data__c="333")
    pusher.push(), puller.pull()
    assert contents(other) == contents(first) == {"a": b"1", "stage/b": b"22", "stage/data/c": b"333"}
    write(first, stage__b="44")  # as long as before
    (first / "stage" / "data" / "c").unlink()
    pusher.push(), puller.pull()
    assert contents(other) == contents(first) == {"a": b"1", "stage/b": b"44"}
    assert not (other / "stage" / "data").exists()
    assert bucket.sent.count("a") == bucket.fetched.count("a") == 1


def test_nothing_is_sent_twice(pair, bucket):
    first, pusher, *_ = pair
    write(first, a="1")
    pusher.push()
    before = os.stat(f"{bucket.url}/{MANIFEST}").st_mtime_ns
    os.utime(first / "a")  # touched, not changed
    pusher.push()
    assert bucket.sent == ["a"] and os.stat(f"{bucket.url}/{MANIFEST}").st_mtime_ns == before


@pytest.mark.parametrize("again", range(20))
def test_a_change_right_behind_a_push_is_seen(pair, again):
    """Clocks of file systems tick every few milliseconds: two contents may have one time and one length."""
    first, pusher, other, puller = pair
    for text in "abc":
        write(first, a=text)
        pusher.push()
    puller.pull()
    assert (other / "a").read_text() == "c"


def test_what_each_machine_has_alone_and_what_is_half_written_stays_here(pair, bucket):
    first, pusher, *_ = pair
    write(first, compiled__x="1", table_new="2", stage__kept="3")
    (first / "half.tmp").mkdir()
    write(first / "half.tmp", x="4")
    (first / "train.new").write_text("5")
    pusher.push()
    assert sorted(bucket.sent) == ["stage/kept", "table_new"]


def test_a_fresh_machine_finds_everything_and_a_stale_one_forgets(pair, bucket, tmp_path):
    first, pusher, *_ = pair
    write(first, stage__result="1", secret="root")
    (first / "secret").chmod(0o600)
    pusher.push()
    third = tmp_path / "third"
    write(third, stage__stale="of a run that never came so far", stage__result="another", compiled__x="program")
    bucket.fetched.clear()
    bucket.mirror(third)
    assert contents(third) == {"stage/result": b"1", "secret": b"root", "compiled/x": b"program"}
    assert (third / "secret").stat().st_mode & 0o777 == 0o600
    bucket.fetched.clear()
    bucket.mirror(third)  # the same machine again
    assert bucket.fetched == []


@pytest.mark.parametrize("cut", ["files", "manifest"])
def test_a_push_that_is_cut_leaves_the_bucket_as_it_was_or_with_newer_files(pair, bucket, tmp_path, cut, monkeypatch):
    first, pusher, *_ = pair
    write(first, rows="1\n", begun="x")
    pusher.push()
    write(first, rows="1\n2\n", result="done")
    (first / "begun").unlink()
    where = {"files": "put_file", "manifest": "pipe_file"}[cut]
    with monkeypatch.context() as patched:
        patched.setattr(bucket.files, where, lambda *_: (_ for _ in ()).throw(OSError("no route to host")))
        with pytest.raises(UserError, match="no route to host"):
            pusher.push()
    assert pusher.lost
    found = tmp_path / "found"
    mirror = bucket.mirror(found)
    rows = "1\n" if cut == "files" else "1\n2\n"  # an object that was sent is newer than the manifest says
    assert contents(found) == {"rows": rows.encode(), "begun": b"x"}
    mirror.push()
    assert json.loads((tmp_path / "bucket" / "run" / MANIFEST).read_text())["rows"][0] == len(rows)


def test_a_file_that_process_0_has_removed_meanwhile_is_left_out(pair, bucket):
    first, pusher, other, puller = pair
    write(first, a="1", b="2")
    pusher.push()
    os.unlink(f"{bucket.url}/b")
    puller.pull()
    assert contents(other) == {"a": b"1"}


def test_a_mapped_file_stays_whole_when_a_newer_one_comes(pair):
    first, pusher, other, puller = pair
    write(first, a="old")
    pusher.push(), puller.pull()
    with (other / "a").open() as held:
        write(first, a="new")
        pusher.push(), puller.pull()
        assert held.read() == "old" and (other / "a").read_text() == "new"


def test_a_folder_of_something_else_and_one_that_cannot_be_written_are_refused(bucket, tmp_path):
    os.makedirs(bucket.url)
    (tmp_path / "bucket" / "run" / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="thesis.tex but no mirror.json"):
        bucket.mirror(tmp_path / "here")
    assert contents(tmp_path / "bucket") == {"run/thesis.tex": b"x"}
    (tmp_path / "bucket" / "run" / "thesis.tex").unlink()
    bucket.files.pipe_file = lambda *_: (_ for _ in ()).throw(PermissionError("403 of storage.objects.create"))
    with pytest.raises(UserError, match="403 of storage.objects.create.*read and write it"):
        bucket.mirror(tmp_path / "here")


def test_a_plan_writes_nothing(bucket, tmp_path):
    mirror = bucket.mirror(tmp_path / "here", writes=False)
    write(tmp_path / "here", a="1")
    mirror.push()
    assert not (tmp_path / "bucket").exists()


def test_what_orbax_writes_has_its_place_in_the_bucket(bucket, tmp_path, monkeypatch):
    inside, outside = tmp_path / "here" / "sft" / "model", tmp_path / "export"
    assert str(storage.remote(inside)) == str(inside)
    monkeypatch.setattr(storage, "_mirror", Mirror(bucket.files, "gs://bucket/run", tmp_path / "here"))
    assert str(storage.remote(inside)) == "gs://bucket/run/sft/model"
    assert str(storage.remote(outside)) == str(outside)


def test_a_barrier_pushes(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "_mirror", bucket.mirror(tmp_path / "here"))
    write(tmp_path / "here", a="1")
    processes.barrier("anywhere")
    assert bucket.sent == ["a"]


# --- the folder of this machine ---------------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(storage, "_claimed", [])
    yield tmp_path
    for descriptor in storage._claimed:
        os.close(descriptor)


def test_a_folder_is_itself_and_needs_no_other(tmp_path, home):
    assert storage.local_folder(str(tmp_path / "work")) == tmp_path / "work"
    assert storage.local_folder("~/work") == tmp_path / "work" and not (tmp_path / "work").exists()
    with pytest.raises(UserError, match="--local_dir is for a --workdir in a bucket"):
        storage.local_folder("/work", "/local")


@pytest.mark.parametrize("url", ["s3://bucket/run", "http://host/run", "gs://", "gs:///run"])
def test_other_schemes_are_refused(url):
    with pytest.raises(UserError, match="gs://BUCKET/FOLDER"):
        storage.local_folder(url)


def test_processes_of_one_machine_get_folders_of_their_own(home):
    first, second = (storage.local_folder("gs://bucket/run") for _ in range(2))
    assert second.name == f"{first.name}.1" and first.parent == home / ".cache" / "rlhf_jax"
    assert storage.local_folder("gs://bucket/other").name.partition(".")[0] != first.name
    os.close(storage._claimed.pop(0))  # that process ended
    assert storage.local_folder("gs://bucket/run/") == first


def test_a_local_folder_with_other_files_is_not_touched(home):
    write(home / "mine", thesis="x")
    with pytest.raises(UserError, match="holds other files"):
        storage.local_folder("gs://bucket/run", str(home / "mine"))
    assert contents(home / "mine") == {"thesis": b"x"}
    local = storage.local_folder("gs://bucket/run", str(home / "mirror"))
    os.close(storage._claimed.pop())
    write(local, half="x")
    with pytest.raises(UserError, match="is the mirror of gs://bucket/run"):
        storage.local_folder("gs://bucket/other", str(home / "mirror"))
    assert storage.local_folder("gs://bucket/run", str(home / "mirror")) == local


def test_a_missing_gcsfs_and_a_bucket_that_is_not_there_are_one_line(monkeypatch):
    monkeypatch.setattr(storage.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs gcsfs: pip install gcsfs"):
        storage.open_bucket("gs://bucket/run")

    class Client:
        def get_bucket(self, name):
            raise RuntimeError(f"404 GET {name}: not found\nmore")

    monkeypatch.setattr(storage.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setitem(
        sys.modules, "google.cloud", types.SimpleNamespace(storage=types.SimpleNamespace(Client=Client))
    )
    with pytest.raises(UserError, match="bucket there cannot be used .*404 GET there: not found.*storage.objectUser"):
        storage.open_bucket("gs://there/run")
