"""How tests run the command in several processes on loopback."""

import socket

from tiny import Command


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start(config, workdir, processes, devices, flags=(), environments=None, program=("-m", "rlhf_jax.main")):
    """The commands of so many processes of `devices` virtual devices each.

    `environments` replaces what names the coordinator, a dict for each process; `flags` and `program` (the command) are
    those of all, or a list with those of each.
    """
    port, commands = free_port(), []
    for process in range(processes):
        named = {
            "RLHF_JAX_COORDINATOR": f"127.0.0.1:{port}",
            "RLHF_JAX_PROCESSES": str(processes),
            "RLHF_JAX_PROCESS_ID": str(process),
        }
        environment = {"JAX_NUM_CPU_DEVICES": str(devices), **(environments[process] if environments else named)}
        given, run = (each[process] if isinstance(each, list) else each for each in (flags, program))
        commands.append(Command(config, workdir, *given, environment=environment, log=f".{process}", program=run))
    return commands


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
