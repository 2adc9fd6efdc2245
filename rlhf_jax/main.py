"""`python -m rlhf_jax.main --config=FILE --workdir=DIR [--config.path.to.field=value ...]`

Exit status: 0 done; 2 a problem the user can mend, one line on stderr; 75 stopped by a signal after saving, run again.
"""

import os
import sys
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from rlhf_jax.errors import UserError

FLAGS = flags.FLAGS
config_flags.DEFINE_config_file("config", None, "File that defines get_config().")
flags.DEFINE_string("workdir", None, "Where everything is written; the same command goes on where it stopped.")
flags.DEFINE_bool("dry_run", False, "Print the plan and exit.")


def _parse(argv: list[str]) -> None:
    """Reads flags and config file; every problem becomes a UserError."""
    try:
        rest = FLAGS(argv)
        if FLAGS.config is None or FLAGS.workdir is None:
            raise UserError("both --config=FILE and --workdir=DIR are needed")
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError, SyntaxError, NameError) as error:
        raise UserError(f"{type(error).__name__}: {error}: look at the --config file and overrides") from error
    if rest[1:]:
        raise UserError(f'argument "{rest[1]}" is not understood: flags are --name=value')


def main(argv: list[str]) -> int:
    """Runs the experiment; returns the exit status."""
    try:
        _parse(argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    workdir = Path(FLAGS.workdir).expanduser().absolute()
    # A resumed run, and stages of one shape, reuse compiled programs.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(workdir / "compiled"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
    from rlhf_jax import distributed, pipeline  # import JAX only once flags and environment are settled
    from rlhf_jax.training.loop import Stopped, catch_signals

    distributed.initialize()
    catch_signals()
    try:
        if FLAGS.dry_run:
            print(pipeline.plan(FLAGS.config, workdir))
        else:
            pipeline.run(FLAGS.config, workdir)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Stopped as stopped:
        print(f"{stopped}: run the same command to go on", file=sys.stderr)
        return 75
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
