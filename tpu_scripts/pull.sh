#!/usr/bin/env bash
# pull.sh gs://BUCKET/RUN DEST [flags]
# pull.sh NAME DEST --run=RUN [flags]
#
# Copies a run's results into the folder DEST, from its bucket or from the disk of the first worker. Compiled programs
# stay behind, and so do checkpoints.
#
#   --zone=Z, --project=P   default: TPU_ZONE and TPU_PROJECT, else gcloud's config
#   --run=RUN               which run of NAME
#   --checkpoints           bring checkpoints/ too
#   --dry-run               print the commands, as for one slice, and run none
#   --help                  print this

source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse 'zone= project= run= checkpoints' "$@"
need 2 'a NAME or gs://... and a DEST are'
source=${args[0]}
dest=${args[1]}

if [[ $source == gs://* ]]; then
  leave='compiled|checkpoints'
  [[ -z ${flag[checkpoints]:-} ]] || leave='compiled'
  run mkdir -p "$dest"
  run gcloud storage rsync "$source" "$dest" --recursive --exclude="^(.*/)?($leave)/.*"
  exit 0
fi

valid_name "$source" NAME
[[ -n ${flag[run]:-} ]] || die '--run=RUN is needed to pull from a worker'
valid_run "${flag[run]}"
find_nodes "$source"
run mkdir -p "$dest"
ssh_to "${nodes[0]}" 0 "$(on_worker pack "${flag[run]}" "${flag[checkpoints]:+all}")"
run gcloud compute tpus tpu-vm scp "${nodes[0]}:rlhf_jax_runs/${flag[run]}/results.tgz" "$dest/" "${where[@]}" \
  --quiet --worker=0
run tar -xzf "$dest/results.tgz" -C "$dest"
run rm "$dest/results.tgz"
