"""Stand-ins for gcloud, kubectl, uv and python, which write down how they were called, and a worker's home folder."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "tpu_scripts"

# Answers by the first rule whose words are all in the command; a rule's replies are used up but for its last.
CLOUD = """#!{python} -IS
import fcntl, json, os, shutil, subprocess, sys
stub, home = os.environ["STUB"], os.environ["HOME"]
call = [os.path.basename(sys.argv[0]), *sys.argv[1:]]
stdin = sys.stdin.read() if "--filename=-" in call else None
with open(stub + "/calls", "a") as file:
    file.write(json.dumps([call, stdin]) + "\\n")
lock = open(stub + "/lock", "w")
fcntl.flock(lock, fcntl.LOCK_EX)
rules = json.load(open(stub + "/rules"))
for rule in rules:
    if all(word in call for word in rule["words"]):
        reply = rule["replies"][0]
        if len(rule["replies"]) > 1:
            del rule["replies"][0]
            with open(stub + "/rules", "w") as file:
                json.dump(rules, file)
        print(reply.get("out", ""), end="")
        sys.exit(reply.get("status", 0))
lock.close()
commands = [word[len("--command="):] for word in call if word.startswith("--command=")]
if commands:
    sys.exit(subprocess.run(["bash", "-c", commands[0]], cwd=home, stdin=subprocess.DEVNULL).returncode)
if "scp" in call:
    source, target = call[call.index("scp") + 1 :][:2]
    local = [os.path.join(home, p.split(":", 1)[1]) if p.startswith(("run:", "run-")) else p for p in (source, target)]
    shutil.copy(*local)
"""

# What it does is in the file `program`, Python source that sees `flags` and `process`.
PROGRAM = """#!{python} -IS
import json, os, signal, sys, time
stub, flags = os.environ["STUB"], sys.argv[1:]
process = os.environ.get("RLHF_JAX_PROCESS_ID", "0")
seen = {{k: v for k, v in os.environ.items() if k.startswith(("RLHF_JAX_", "JAX_"))}}
with open(stub + "/programs", "a") as file:
    file.write(json.dumps([flags, seen, os.getpid(), os.getcwd()]) + "\\n")
def until_stopped(status):
    def stop(*_):
        time.sleep(0.1)
        sys.exit(status)
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    open(stub + "/ready" + process, "w").close()
    while True:
        time.sleep(0.05)
exec(open(stub + "/program").read())
"""

UV = """#!/bin/bash
printf '%q ' "$@" >>"$STUB/uv"; echo >>"$STUB/uv"
if [[ $1 == venv ]]; then
  folder=${{!#}}
  mkdir -p "$folder/bin"
  cp "$STUB/bin/python" "$folder/bin/python"
  echo 'VIRTUAL_ENV=1 PATH=$HOME/rlhf_jax_env/bin:$PATH' >"$folder/bin/activate"
fi
"""


def heed_signals():
    """A shell that starts the tests in the background has them ignore SIGINT, libtpu SIGHUP; bash can not undo that."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


class Machine:
    """Runs scripts with the stand-ins first on PATH, and tells what they were called with."""

    def __init__(self, folder: Path):
        self.folder, self.home, self.bin = folder, folder / "home", folder / "bin"
        self.home.mkdir()
        self.bin.mkdir()
        for name, text in {"gcloud": CLOUD, "kubectl": CLOUD, "python": PROGRAM, "uv": UV}.items():
            self.command(name, text.format(python=sys.executable))
        self.environment = {
            "PATH": f"{self.bin}:/usr/bin:/bin",
            "HOME": str(self.home),
            "STUB": str(folder),
            "TMPDIR": str(folder),
            "TPU_ZONE": "z",
            "LC_ALL": "C.UTF-8",
        }
        self.rules()
        self.program("sys.exit(0)")

    def command(self, name, text):
        """Puts a command first on PATH."""
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def rules(self, *rules):
        """Each (words of the command, reply, ...): a reply is what it prints, or the status it fails with."""
        replies = [
            [{"status": r} if isinstance(r, int) else {"out": f"{r}\n" if r else ""} for r in rule[1:]]
            for rule in rules
        ]
        stored = [{"words": rule[0].split(), "replies": r} for rule, r in zip(rules, replies, strict=True)]
        (self.folder / "rules").write_text(json.dumps(stored))

    def program(self, source):
        (self.folder / "program").write_text(source)

    def start(self, script, *args, **kwargs):
        path = script if isinstance(script, Path) else SCRIPTS / script
        command = ["bash", str(path), *map(str, args)]
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL, "text": True}
        options["preexec_fn"] = heed_signals
        return subprocess.Popen(command, env=self.environment, cwd=self.folder, **options | kwargs)

    def run(self, script, *args, **kwargs):
        process = self.start(script, *args, **kwargs)
        out, err = process.communicate(timeout=60)
        return subprocess.CompletedProcess(args, process.returncode, out, err)

    def paste(self, text):
        """Runs what a dry run printed, as a user would in a shell."""
        subprocess.run(["bash", "-c", text], env=self.environment, cwd=self.folder, check=False, capture_output=True)

    def _read(self, name):
        path = self.folder / name
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def calls(self, forget=True):
        """The commands that gcloud and kubectl were called with."""
        calls = [call for call, _ in self._read("calls")]
        if forget:
            (self.folder / "calls").unlink(missing_ok=True)
        return calls

    def applied(self):
        """What kubectl read from its standard input."""
        return [stdin for _, stdin in self._read("calls") if stdin is not None]

    def programs(self):
        """(flags, environment, process number, folder) of every start of the program."""
        return self._read("programs")

    def install(self):
        """A worker as setup.sh leaves it."""
        (self.home / "rlhf_jax").mkdir()
        (self.home / "rlhf_jax/tpu_scripts").symlink_to(SCRIPTS)
        subprocess.run(["uv", "venv", self.home / "rlhf_jax_env"], env=self.environment, check=True)


@pytest.fixture
def machine(tmp_path):
    machine = Machine(tmp_path)
    yield machine
    for _, _, process, _ in machine.programs():  # of a test that failed
        if f"STUB={tmp_path}".encode() in _environment(process):
            os.kill(process, signal.SIGKILL)


def _environment(process):
    try:
        return Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
    except OSError:
        return []


@pytest.fixture
def left(machine):
    """Tells the processes that still run in this test's environment."""

    def left():
        mark = f"STUB={machine.folder}".encode()
        numbers = [path.name for path in Path("/proc").iterdir() if path.name.isdigit()]
        return [number for number in numbers if mark in _environment(number)]

    return left
