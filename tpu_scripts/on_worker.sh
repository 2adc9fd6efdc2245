#!/usr/bin/env bash
# on_worker.sh ACTION ...
#
# What the other scripts do on a worker, over ssh. A run's folder is ~/rlhf_jax_runs/RUN, with its log, pid and status;
# its lock is held as long as anything of the run lives, which a process number alone does not tell after a reboot.
#
#   install                                  put ~/rlhf_jax.new in the place of ~/rlhf_jax and install it
#   start RUN RESTARTS WORKDIR -- FLAGS...   start worker.sh, detached
#   state RUN                                print: state running, state STATUS, or state lost (ended without a status)
#   stop RUN SECONDS                         SIGTERM, and wait that long for the end; RUN '' is every run
#   log RUN LINES follow|""                  print the log's end; RUN '' is the newest
#   pack RUN all|""                          make results.tgz of the run's workdir, without checkpoints/ unless all
#   --help                                   print this

source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse '' "$@"
runs=~/rlhf_jax_runs
[[ -z ${flag[dry-run]:-} ]] || die 'no dry run here: the scripts that call this have one'
action=${args[0]:-}
name=${args[1]:-}

running() {
  [[ -e $1/lock ]] && ! flock --nonblock "$1/lock" true
}

install() {
  local folder new=~/rlhf_jax.new stamp
  for folder in "$runs"/*/; do
    ! running "$folder" || die "run $(basename "$folder") is going on: stop.sh ends it"
  done
  # What an earlier installation brought and this one does not must go: Python would still import it.
  export LC_ALL=C
  (cd "$new" && find . -type f | sort) >"$new/.brought"
  mkdir -p ~/rlhf_jax
  cd ~/rlhf_jax
  [[ ! -e .brought ]] || comm -23 .brought "$new/.brought" | xargs --no-run-if-empty --delimiter='\n' rm -f --
  cp -a "$new/." .
  rm -rf "$new"

  stamp=$(sha256sum pyproject.toml)
  if [[ -e ~/rlhf_jax_env/installed && $(<~/rlhf_jax_env/installed) == "$stamp" ]]; then
    say 'pyproject.toml has not changed: nothing to install'
    return
  fi
  # The images' own Python may be older than the package takes; uv brings one.
  PATH=$HOME/.local/bin:$PATH
  command -v uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
  rm -rf ~/rlhf_jax_env
  uv venv --python 3.12 ~/rlhf_jax_env
  uv pip install --python ~/rlhf_jax_env/bin/python --editable '.[tpu]'
  printf '%s\n' "$stamp" >~/rlhf_jax_env/installed
}

start() {
  local folder=$runs/$name restarts=${args[2]} job
  [[ -x ~/rlhf_jax_env/bin/python ]] || die 'nothing is installed here: run setup.sh first'
  mkdir -p "$folder"
  exec 9>"$folder/lock"
  if ! flock --nonblock 9; then
    say "run $name is going on: left as it is"
    return
  fi
  rm -f "$folder/pid" "$folder/status"
  printf '%s\n' "${args[3]}" >"$folder/workdir"
  cd ~/rlhf_jax
  setsid nohup bash tpu_scripts/worker.sh --folder="$folder" --restarts="$restarts" -- "${rest[@]}" \
    >>"$folder/log" 2>&1 </dev/null &
  job=$!
  while [[ ! -e $folder/pid ]] && kill -0 "$job" 2>/dev/null; do sleep 0.1; done
  say "run $name started: ~/rlhf_jax_runs/$name/log"
}

state() {
  local folder=$runs/$name state=lost
  ! running "$folder" || state=running  # asked first: a run that ends between the two questions has left its status
  [[ ! -e $folder/status ]] || state=$(<"$folder/status")
  echo "state $state"
}

stop() {
  local folder status failed=0 deadline=$((SECONDS + args[2])) asked=()
  for folder in "$runs"/${name:-*}/; do
    running "$folder" || continue
    kill "$(<"$folder/pid")" 2>/dev/null || true  # it may just have ended
    asked+=("$folder")
  done
  for folder in "${asked[@]}"; do
    while running "$folder" && ((SECONDS < deadline)); do sleep 0.2; done
    ! running "$folder" || die "run $(basename "$folder") has not ended after ${args[2]} s: give it longer by --timeout" 1
    status=$(cat "$folder/status" 2>/dev/null || echo 1)
    say "run $(basename "$folder") ended with status $status"
    [[ $status -eq 0 || $status -eq 75 ]] || failed=$status
  done
  ((${#asked[@]})) || say 'no run is going on'
  return "$failed"
}

log() {
  local file=$runs/$name/log
  # shellcheck disable=SC2012  # run names have no newline
  [[ -n $name ]] || file=$(ls -t "$runs"/*/log 2>/dev/null | head -n 1) || true
  [[ -f $file ]] || die "there is no log${name:+ of run $name}: launch.sh starts a run"
  if [[ ${args[3]} == follow ]]; then
    exec tail --lines="${args[2]}" --follow=name "$file"
  fi
  tail --lines="${args[2]}" "$file"
}

pack() {
  local folder=$runs/$name workdir leave=(--exclude=compiled)
  [[ -f $folder/workdir ]] || die "there is no run $name: name one by --run"
  workdir=$(<"$folder/workdir")
  [[ $workdir != gs://* ]] || die "run $name is in a bucket: pull.sh $workdir DEST"
  [[ ${args[2]} == all ]] || leave+=(--exclude=checkpoints)
  cd ~/rlhf_jax
  tar -czf "$folder/results.tgz" "${leave[@]}" -C "${workdir/#\~\//$HOME/}" .
}

case $action in
  install | start | state | stop | log | pack) "$action" ;;
  *) die "unknown action \"$action\": see on_worker.sh --help" ;;
esac
