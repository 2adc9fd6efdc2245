#!/usr/bin/env bash
# launch.sh NAME [flags] -- --config=FILE --workdir=gs://BUCKET/RUN [any flag of rlhf_jax.main]
#
# Starts the run on every worker of every slice, where it goes on when you log out. A worker on which that run is going
# on is left as it is. The same command after a stop, a preemption or a crash goes on from the last save.
#
#   --zone=Z, --project=P   default: TPU_ZONE and TPU_PROJECT, else gcloud's config
#   --run=RUN               the run's name; default: the last part of --workdir. Its log is ~/rlhf_jax_runs/RUN/log
#   --restarts=N            run again so often after a crash, or a stop that stop.sh did not ask for (0)
#   --local-workdir         several workers may write to their own disks: --workdir is not gs://
#   --wait                  follow until all workers have ended; the exit status is theirs, 2 before 75 before any other
#   --every=SECONDS         how often to look while waiting (30)
#   --dry-run               print the commands, as for one slice, and run none
#   --help                  print this

source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse 'zone= project= run= restarts= local-workdir wait every=' "$@"
need 1 'one NAME is'
valid_name "${args[0]}" NAME
restarts=$(whole_number restarts 0)
every=$(whole_number every 30)
workdir=
for arg in "${rest[@]}"; do
  [[ $arg != --workdir=* ]] || workdir=${arg#--workdir=}
done
[[ -n $workdir ]] || die '--workdir=DIR is needed after --, as: launch.sh NAME -- --config=FILE --workdir=gs://BUCKET/RUN'
workdir=${workdir%/}
run_name=${flag[run]:-${workdir##*/}}
valid_run "$run_name"

find_nodes "${args[0]}"
if [[ $workers -gt 1 && $workdir != gs://* && -z ${flag[local-workdir]:-} ]]; then
  die "$workers workers do not share the disk of --workdir=$workdir: give a gs:// one, or --local-workdir if you mean it"
fi
on_workers "$(on_worker start "$run_name" "$restarts" "$workdir" -- "${rest[@]}")"
[[ -n ${flag[wait]:-} ]] || exit 0

shown=''
while true; do
  if [[ -n ${flag[dry-run]:-} ]]; then
    on_workers "$(on_worker state "$run_name")"
    exit 0
  fi
  states=$(on_workers "$(on_worker state "$run_name")")
  mapfile -t states < <(sed -n 's/^state //p' <<<"$states")
  [[ ${#states[@]} -eq $workers ]] || die "${#states[@]} of $workers workers say how the run goes: see logs.sh" 1
  if [[ ${states[*]} != "$shown" ]]; then
    shown=${states[*]}
    say "$run_name: $shown"
  fi
  [[ " $shown " == *' running '* ]] || exit "$(combined_status "${states[@]/lost/1}")"
  sleep "$every"
done
