"""How tests run the command in several processes on loopback."""

import json
import socket
from pathlib import Path

from tiny import Command

AUDITED = str(Path(__file__).with_name("audited_main.py"))


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start(config, workdir, processes, devices, flags=(), environments=None, program=None):
    """The commands of so many processes of `devices` virtual devices each; process i writes notes to `notes_of(...)`.

    `environments` replaces what names the coordinator, a dict for each process; `program` the one that writes notes.
    """
    port, commands = free_port(), []
    for process in range(processes):
        named = {
            "RLHF_JAX_COORDINATOR": f"127.0.0.1:{port}",
            "RLHF_JAX_PROCESSES": str(processes),
            "RLHF_JAX_PROCESS_ID": str(process),
        }
        environment = {"JAX_NUM_CPU_DEVICES": str(devices), **(environments[process] if environments else named)}
        audited = (AUDITED, str(notes_path(workdir, process)))
        given = flags[process] if flags and not isinstance(flags[0], str) else flags
        commands.append(
            Command(config, workdir, *given, environment=environment, log=f".{process}", program=program or audited)
        )
    return commands


def notes_path(workdir, process):
    return workdir.with_name(f"{workdir.name}.{process}.notes")


def notes(workdir, process):
    """What `audited_main` noted in a process."""
    path = notes_path(workdir, process)
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def ends(commands, timeout=300):
    """How the processes finished; none is left behind."""
    try:
        return [command.wait(timeout) for command in commands]
    finally:
        for command in commands:
            command.process.kill()


def told(done):
    """Exit statuses and the end of what each process said, for a failed assertion."""
    return "\n".join(f"{i}: status {end.status}\n{end.stderr[-1500:]}" for i, end in enumerate(done))
