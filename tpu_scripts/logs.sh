#!/usr/bin/env bash
# logs.sh NAME [flags]
#
# Prints the end of a run's log on one worker. Only the first worker of the first slice reports progress.
#
#   --zone=Z, --project=P   default: TPU_ZONE and TPU_PROJECT, else gcloud's config
#   --run=RUN               the run's name; default: the newest log
#   --worker=I, --slice=I   which worker of which slice (0, 0)
#   --lines=N               how many lines (100)
#   --follow                go on printing until Ctrl-C; the run goes on
#   --dry-run               print the commands, as for one slice, and run none
#   --help                  print this

source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse 'zone= project= run= worker= slice= lines= follow' "$@"
need 1 'one NAME is'
valid_name "${args[0]}" NAME
[[ -z ${flag[run]:-} ]] || valid_run "${flag[run]}"
worker=$(whole_number worker 0)
slice=$(whole_number slice 0)
lines=$(whole_number lines 100)
follow=${flag[follow]:+follow}

find_nodes "${args[0]}"
[[ $slice -lt ${#nodes[@]} ]] || die "--slice=$slice: ${args[0]} has ${#nodes[@]}, counted from 0"
ssh_to "${nodes[slice]}" "$worker" "$(on_worker log "${flag[run]:-}" "$lines" "$follow")"
