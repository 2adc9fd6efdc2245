#!/usr/bin/env bash
# stop.sh NAME [flags]
#
# Asks a run to save and end, on all workers at once, and waits until it has. The launch.sh command goes on from there.
# Status 0 when it ended with 75 (saved) or 0 (it was done), or none was going on; else the status it ended with.
#
#   --zone=Z, --project=P   default: TPU_ZONE and TPU_PROJECT, else gcloud's config
#   --run=RUN               the run's name; default: every run
#   --timeout=SECONDS       how long to wait for the save (600)
#   --dry-run               print the commands, as for one slice, and run none
#   --help                  print this

source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse 'zone= project= run= timeout=' "$@"
need 1 'one NAME is'
valid_name "${args[0]}" NAME
[[ -z ${flag[run]:-} ]] || valid_run "${flag[run]}"
timeout=$(whole_number timeout 600)

find_nodes "${args[0]}"
on_workers "$(on_worker stop "${flag[run]:-}" "$timeout")"
