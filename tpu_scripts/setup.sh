#!/usr/bin/env bash
# setup.sh NAME [flags]
#
# Brings the code of this checkout's last commit to ~/rlhf_jax on every worker of every slice, and installs it with
# jax[tpu] in ~/rlhf_jax_env. The installation is skipped where pyproject.toml has not changed since the last one.
# Before the first time: ssh-add ~/.ssh/google_compute_engine, without which gcloud reaches one worker only.
#
#   --zone=Z, --project=P   default: TPU_ZONE and TPU_PROJECT, else gcloud's config
#   --dirty                 bring the files as they stand, with changes that are in no commit
#   --dry-run               print the commands, as for one slice, and run none
#   --help                  print this

source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse 'zone= project= dirty' "$@"
need 1 'one NAME is'
valid_name "${args[0]}" NAME

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
build=$root/build
archive=$build/rlhf_jax.tgz
run mkdir -p "$build"
if [[ -n ${flag[dirty]:-} ]]; then
  # An index of its own, so that the user's staged changes stay what they are.
  run rm -rf "$build/index" "$build/tree"
  run env GIT_INDEX_FILE="$build/index" git -C "$root" add --all
  run env GIT_INDEX_FILE="$build/index" git -C "$root" checkout-index --all --prefix="$build/tree/"
  run tar -czf "$archive" -C "$build/tree" .
else
  ask git -C "$root" status --porcelain
  [[ -z $answer ]] || die 'there are changes that are in no commit: commit them, or bring them along by --dirty'
  run git -C "$root" archive --format=tar.gz --output="$archive" HEAD
fi

find_nodes "${args[0]}"
for node in "${nodes[@]}"; do
  run gcloud compute tpus tpu-vm scp "$archive" "$node:rlhf_jax.tgz" "${where[@]}" --quiet --worker=all
done
on_workers 'rm -rf ~/rlhf_jax.new && mkdir ~/rlhf_jax.new && tar -xzf ~/rlhf_jax.tgz -C ~/rlhf_jax.new &&
bash ~/rlhf_jax.new/tpu_scripts/on_worker.sh install'
