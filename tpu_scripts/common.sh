# Sourced by every script here: flags, the project and the zone, dry runs, and the workers of a queued resource.
# shellcheck shell=bash

set -euo pipefail
shopt -s inherit_errexit  # in $(...) too

declare -A flag=()  # flags that were given, by name; a flag without a value is 1
args=()             # what stands before --, flags aside
rest=()             # what stands after --
where=()            # --zone and --project as gcloud takes them; where they are not given gcloud's own config has them
nodes=()            # the TPU VMs of a queued resource, one a slice
workers=0           # hosts of all nodes together

say() { printf '%s\n' "$*" >&2; }

# die MESSAGE [STATUS]
die() {
  printf 'error: %s\n' "$1" >&2
  exit "${2:-2}"
}

# A script's help is its header: the comment from its second line to the first line that is none.
show_help() {
  sed -n '2,$ { /^#/!q; s/^# \{0,1\}//; p }' "$0"
  exit 0
}

# parse "NAME= NAME ..." "$@": a name that ends in = takes a value, any other takes none.
parse() {
  local known=" $1 help dry-run " arg name
  shift
  while (($#)); do
    arg=$1
    shift
    case $arg in
      --) rest=("$@"); break ;;
      --*=*)
        name=${arg%%=*}
        name=${name#--}
        [[ $known == *" $name= "* ]] || die "unknown flag --$name=: see ${0##*/} --help"
        flag[$name]=${arg#*=}
        ;;
      -*)
        name=${arg#--}
        [[ $known != *" $name= "* ]] || die "--$name needs a value: --$name=VALUE"
        [[ $known == *" $name "* ]] || die "unknown flag $arg: see ${0##*/} --help"
        flag[$name]=1
        ;;
      *) args+=("$arg") ;;
    esac
  done
  [[ -z ${flag[help]:-} ]] || show_help
  local zone=${flag[zone]:-${TPU_ZONE:-}} project=${flag[project]:-${TPU_PROJECT:-}}
  [[ -z $zone ]] || where+=("--zone=$zone")
  [[ -z $project ]] || where+=("--project=$project")
}

# need N WHAT: as many arguments before -- as the script takes.
need() {
  [[ ${#args[@]} -eq $1 ]] || die "$2 needed, ${#args[@]} given: see ${0##*/} --help"
}

# valid_name NAME WHAT: what Google Cloud and Kubernetes take as a name, and a shell needs no quotes for.
valid_name() {
  [[ $1 =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] ||
    die "$2 \"$1\" is not lower case letters, digits and hyphens after a letter: give it another name"
}

# valid_run RUN: what is a folder's name and needs no quotes.
valid_run() {
  [[ $1 =~ ^[A-Za-z0-9_][A-Za-z0-9._-]*$ ]] ||
    die "run \"$1\" is not letters, digits, hyphens, points and underscores: name it so by --run=RUN"
}

# whole_number FLAG DEFAULT [LEAST]: prints the flag's value.
whole_number() {
  local value=${flag[$1]:-$2}
  [[ $value =~ ^(0|[1-9][0-9]{0,8})$ && $value -ge ${3:-0} ]] ||
    die "--$1=$value: a whole number of at least ${3:-0} is needed"
  printf '%s' "$value"
}

quoted() {
  local line
  printf -v line '%q ' "$@"
  printf '%s\n' "${line% }"
}

# Runs a command, or prints it in a dry run. A failing one ends the script with its status.
run() {
  if [[ -n ${flag[dry-run]:-} ]]; then
    quoted "$@"
    return
  fi
  "$@" || {
    local status=$?
    say "error: status $status from $(quoted "$@"): mend what it says and run ${0##*/} again"
    exit "$status"
  }
}

# Runs a command whose output is wanted, in `answer`; in a dry run that is empty.
ask() {
  answer=
  if [[ -n ${flag[dry-run]:-} ]]; then run "$@"; else answer=$(run "$@"); fi
}

# Sets `answer` to the state of a queued resource, empty where there is none. `list` and not `describe`, whose failure
# would not tell a resource that is missing from a login that has run out.
ask_state() {
  ask gcloud compute tpus queued-resources list "${where[@]}" --filter="name~/queuedResources/$1\$" \
    --format='value(state.state)'
}

# Sets `nodes` and `workers` to those of a queued resource; a dry run takes one node of one worker.
find_nodes() {
  ask gcloud compute tpus tpu-vm list "${where[@]}" --filter="queuedResource~/queuedResources/$1\$" \
    --sort-by=name --format='value(name.basename(),state,networkEndpoints.len())'
  [[ -z ${flag[dry-run]:-} ]] || answer="$1 READY 1"
  [[ -n $answer ]] || die "$1 has no TPU VM: run create.sh $1 first, or see its zone and project"
  local node state hosts
  while read -r node state hosts; do
    [[ $state == READY ]] || die "TPU VM $node is $state: wait until it is READY, or run create.sh $1 again"
    nodes+=("$node")
    workers=$((workers + hosts))
  done <<<"$answer"
}

# ssh_to NODE WORKER COMMAND: the command is one string for the worker's shell.
ssh_to() {
  run gcloud compute tpus tpu-vm ssh "$1" "${where[@]}" --quiet --worker="$2" --command="$3"
}

# Runs a command on all workers of all nodes at once; fails with the status of the last node that failed.
on_workers() {
  local node job jobs=() status=0
  for node in "${nodes[@]}"; do
    ssh_to "$node" all "$1" &
    jobs+=($!)
  done
  for job in "${jobs[@]}"; do wait "$job" || status=$?; done
  return "$status"
}

# on_worker ACTION [ARGUMENT...]: prints the command for a worker's shell.
on_worker() {
  # The worker's shell is to expand ~.
  # shellcheck disable=SC2088
  printf 'bash ~/rlhf_jax/tpu_scripts/on_worker.sh %s' "$(quoted "$@")"
}

# One status of several: 2 before 75 before any other failure before 0. Where a user's mistake or a signal ended one
# process the others crash of missing it, so the crash is not what to tell.
combined_status() {
  local status failed=0
  for status in "$@"; do
    case $status in
      0) ;;
      2) failed=2; break ;;
      75) failed=75 ;;
      *) [[ $failed -ne 0 ]] || failed=$status ;;
    esac
  done
  printf '%s' "$failed"
}
