"""`python -m rlhf_jax.main --config=FILE[:ARGUMENT] --workdir=DIR [--config.path.to.field=value ...]`

Exit status: 0 done; 2 a problem the user can mend, one line on stderr; 75 stopped by a signal after saving, run again.
"""

import os
import runpy
import sys
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from rlhf_jax import xla_flags
from rlhf_jax.config import nearest
from rlhf_jax.errors import UserError

FLAGS = flags.FLAGS
config_flags.DEFINE_config_file("config", None, "File that defines get_config(), as FILE or FILE:ARGUMENT.")
flags.DEFINE_string("workdir", None, "Folder or gs://BUCKET/FOLDER for all that is written.")
flags.DEFINE_string("local_dir", "", "Of a --workdir=gs://BUCKET/FOLDER: where this machine keeps its copy.")
flags.DEFINE_bool("dry_run", False, "Print the plan and exit.")
flags.DEFINE_string("topology", "", "Compile every stage for this TPU slice, as v5e:4x4, say what fits, and exit.")
flags.DEFINE_bool("deterministic", False, "On a GPU: the same bits in every run.")
flags.DEFINE_float("memory_fraction", 0.0, "Of a GPU's memory, taken at the start; 0 leaves JAX's own 0.75.")
flags.DEFINE_string("coordinator", "", "HOST:PORT of process 0, where no cluster's environment names it.")
flags.DEFINE_integer("processes", 0, "How many processes there are; 1: this one is alone, whatever surrounds it.")
flags.DEFINE_integer("process_id", -1, "This process's number, from 0 on.")
flags.DEFINE_float("silent_seconds", 30.0, "A process that gives no sign of life for so long is gone: all end.")
flags.DEFINE_float("hang_seconds", 1800.0, "If no process has moved on for so long, all end.")


def _unknown_override(argv: list[str]) -> str | None:
    """What is wrong with the first override of a field that the config file's config does not have."""
    file = next((arg.split("=", 1)[1] for arg in argv if arg.startswith("--config=")), None)
    overrides = [arg.split("=")[0].removeprefix("--config.") for arg in argv if arg.startswith("--config.")]
    if file is None or not overrides:
        return None
    source, _, argument = file.partition(":")  # FILE, or FILE:ARGUMENT of get_config
    config = runpy.run_path(source)["get_config"](*([argument] if argument else []))
    for path in overrides:
        group = config
        for name in path.split("."):
            fields = group.keys() if hasattr(group, "keys") else ()
            if name not in fields:
                return f"unknown field {path}: {nearest(name, fields)}"
            group = group[name]
    return None


def _parse(argv: list[str]) -> None:
    """Reads flags and config file; every problem becomes a UserError."""
    try:
        rest = FLAGS(argv)
        if FLAGS.config is None or not FLAGS.workdir:
            raise UserError("both --config=FILE and --workdir=DIR are needed")
        FLAGS.config.keys()  # a config file that could not be loaded raises here
    except UserError:
        raise
    except Exception as error:  # a config file is a program: anything may come out of it
        try:
            unknown = _unknown_override(argv)
        except Exception:
            unknown = None
        raise UserError(unknown or f"{type(error).__name__}: {error}: mend the --config file or the flag") from error
    if rest[1:]:
        raise UserError(f'argument "{rest[1]}" is not understood: flags are --name=value')


def _plan_topology() -> int:
    """Prints what the stages are on a slice that is not here, line by line as they are compiled."""
    from rlhf_jax import pipeline
    from rlhf_jax.distributed import topology

    try:
        topology.use_cpu_and_libtpu()
        for line in pipeline.plan_topology(FLAGS.config, Path(FLAGS.workdir), FLAGS.topology):
            print(line, flush=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def main(argv: list[str]) -> int:
    """Runs the experiment; returns the exit status."""
    if "--help" in argv[1:] or "-h" in argv[1:]:
        print(f"{__doc__}\n{FLAGS.main_module_help()}")
        return 0
    try:
        _parse(argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    xla_flags.prepare(os.environ, deterministic=FLAGS.deterministic, memory_fraction=FLAGS.memory_fraction)
    if FLAGS.topology:
        return _plan_topology()
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
    import jax  # only once flags and environment are settled

    from rlhf_jax import pipeline
    from rlhf_jax.distributed import heartbeat, processes, stopping, storage
    from rlhf_jax.training.loop import Stopped

    status = 0
    try:
        workdir = storage.local_folder(FLAGS.workdir, FLAGS.local_dir)
        if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # a resumed run, and stages of one shape, reuse programs
            jax.config.update("jax_compilation_cache_dir", str(workdir / "compiled"))
        patience = heartbeat.Patience(FLAGS.silent_seconds, FLAGS.hang_seconds)
        processes.initialize(FLAGS.coordinator, FLAGS.processes, FLAGS.process_id, patience)
        stopping.catch_signals()  # after JAX, which catches some itself
        stopping.watch_machine(processes.cluster(dict(os.environ)))
        processes.begin_storage(FLAGS.workdir, workdir, writes=not FLAGS.dry_run)
        try:
            if FLAGS.dry_run:
                print(pipeline.plan(FLAGS.config, workdir))
            else:
                pipeline.run(FLAGS.config, workdir)
        except Stopped as stopped:
            print(f"{stopped}: run the same command to go on", file=sys.stderr)
            status = 75
        processes.finish()
    except Exception as error:
        return processes.fail(error)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv))
