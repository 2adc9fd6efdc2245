#!/usr/bin/env bash
# delete.sh NAME... --yes [flags]
#
# Deletes queued resources with their TPU VMs and whatever is on the VMs' disks. One that is gone already is no error.
#
#   --yes                   it is meant
#   --zone=Z, --project=P   default: TPU_ZONE and TPU_PROJECT, else gcloud's config
#   --dry-run               print the commands and run none
#   --help                  print this

source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse 'yes zone= project=' "$@"
[[ ${#args[@]} -gt 0 ]] || die 'a NAME is needed: see delete.sh --help'
for name in "${args[@]}"; do valid_name "$name" NAME; done
[[ -n ${flag[yes]:-}${flag[dry-run]:-} ]] || die "this deletes ${args[*]} with all that is on the disks: add --yes"

for name in "${args[@]}"; do
  ask_state "$name"
  if [[ -z $answer && -z ${flag[dry-run]:-} ]]; then
    say "$name is gone already"
  else
    run gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet
  fi
done
