#!/usr/bin/env bash
# worker.sh [flags] -- --config=FILE --workdir=DIR [any flag of rlhf_jax.main]
#
# What runs on one worker: python -m rlhf_jax.main with these flags, in ~/rlhf_jax_env where setup.sh made that and no
# other environment is active. launch.sh, gke.sh and simulate_pod.sh all end here. SIGTERM and SIGINT are passed on to
# the program, which saves and ends with status 75. The exit status is the program's: 0 done, 2 a mistake to mend, 75
# stopped after saving, any other a crash.
#
#   --restarts=N      run again so often after a crash, or a 75 that no signal to worker.sh asked for (0)
#   --pause=SECONDS   wait before running again, for the other workers to end too (20)
#   --folder=DIR      write worker.sh's process number to DIR/pid and, at the end, the exit status to DIR/status
#   --dry-run         print the command and do not run it
#   --help            print this

source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse 'restarts= pause= folder=' "$@"
need 0 'no argument before -- is'
restarts=$(whole_number restarts 0)
pause=$(whole_number pause 20)
folder=${flag[folder]:-}
if [[ -n ${flag[dry-run]:-} ]]; then
  run python -m rlhf_jax.main "${rest[@]}"
  exit
fi

# Its own process group: a Ctrl-C at a terminal would else reach the program twice, and the second time ends it unsaved.
set -m
child='' signalled=''
# shellcheck disable=SC2329  # called by the traps
pass_on() {
  signalled=$1
  [[ -z $child ]] || kill -s "$1" "$child" 2>/dev/null || true
}
trap 'pass_on TERM' TERM
trap 'pass_on INT' INT

# Runs a command in the background, where a trap can interrupt the wait for it; sets `status`.
run_child() {
  "$@" </dev/null &
  child=$!
  [[ -z $signalled ]] || kill -s "$signalled" "$child" 2>/dev/null || true  # it came before there was a child
  while kill -0 "$child" 2>/dev/null; do wait "$child" || true; done
  status=0
  wait "$child" || status=$?
  child=
}

[[ -z $folder ]] || { mkdir -p "$folder" && rm -f "$folder/status" && echo $$ >"$folder/pid"; }
if [[ -z ${VIRTUAL_ENV:-} && -f ~/rlhf_jax_env/bin/activate ]]; then
  # shellcheck source=/dev/null
  source ~/rlhf_jax_env/bin/activate
fi

again=0
while true; do
  run_child python -m rlhf_jax.main "${rest[@]}"
  [[ $status -ne 0 && $status -ne 2 && -z $signalled && $again -lt $restarts ]] || break
  again=$((again + 1))
  say "worker.sh: status $status, run again $again of $restarts in $pause s"
  ended=$status
  run_child sleep "$pause"
  status=$ended
  [[ -z $signalled ]] || break
done
[[ -z $folder ]] || { echo "$status" >"$folder/status.new" && mv "$folder/status.new" "$folder/status"; }
exit "$status"
