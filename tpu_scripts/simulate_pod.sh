#!/usr/bin/env bash
# simulate_pod.sh N [flags] -- --config=FILE --workdir=DIR [any flag of rlhf_jax.main]
#
# Runs N processes of one job on this machine's CPU, each through worker.sh as on a pod. SIGTERM, SIGINT and SIGHUP
# reach all of them as SIGTERM; a second one ends them without saving. When one fails the others are ended within 60
# seconds. No process is left behind. Needs Linux.
#
# The exit status is 0 when all processes' are; else that of those that failed of themselves, before the others were
# told to end: 2 before 75 before any other.
#
#   --devices=K    CPU devices of each process (1)
#   --folder=DIR   where each process I has its DIR/I/log; default: a new folder in TMPDIR or /tmp
#   --dry-run      print the commands and run none
#   --help         print this

source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse 'devices= folder=' "$@"
need 1 'one N is'
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
processes=${args[0]}
[[ $processes =~ ^[1-9][0-9]{0,2}$ ]] || die "N = \"$processes\": a whole number from 1 to 999 is needed"
devices=$(whole_number devices 1 1)
folder=${flag[folder]:-${TMPDIR:-/tmp}/rlhf_jax_pod.$$}

# Below the ports that Linux gives out of itself, and nobody answers there.
port=$((20000 + RANDOM % 12000))
while (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do port=$((20000 + RANDOM % 12000)); done

pids=() printers=() statuses=() failed=()
told=''  # who told all to end: a signal, or a failure

tell_all() {
  local i
  told=${told:-$1}
  for i in "${!pids[@]}"; do
    [[ -n ${statuses[i]:-} ]] || kill "${pids[i]}" 2>/dev/null || true
  done
}

# Each worker leads a session, in which all that it started is.
end_sessions() {
  local pid
  for pid in "${pids[@]}"; do pkill -KILL -s "$pid" || true; done
}

# shellcheck disable=SC2329  # called by the trap
clean_up() {
  end_sessions
  ((${#printers[@]} == 0)) || wait "${printers[@]}" || true
  rm -f "$folder"/*/pipe
}

start() {
  local own=$folder/$1 command
  command=(env RLHF_JAX_COORDINATOR="127.0.0.1:$port" RLHF_JAX_PROCESSES="$processes" RLHF_JAX_PROCESS_ID="$1"
    JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES="$devices" bash "$here/worker.sh" --folder="$own" -- "${rest[@]}")
  if [[ -n ${flag[dry-run]:-} ]]; then
    quoted "${command[@]}"
    return
  fi
  mkdir -p "$own"
  rm -f "$own/pipe"
  mkfifo "$own/pipe"
  (trap '' TERM INT HUP; tee "$own/log" <"$own/pipe" | sed -u "s/^/[$1] /") &
  printers+=($!)
  setsid "${command[@]}" >"$own/pipe" 2>&1 </dev/null &
  pids+=($!)
}

[[ -n ${flag[dry-run]:-} ]] || trap clean_up EXIT
trap 'tell_all signal' TERM INT HUP
for ((i = 0; i < processes; i++)); do start "$i"; done
[[ -z ${flag[dry-run]:-} ]] || exit 0
[[ -z $told ]] || tell_all signal  # it came while they were started
say "$processes processes, coordinator on port $port, logs in $folder/*/log"

failed_at=''
while ((${#statuses[@]} < processes)); do
  for i in "${!pids[@]}"; do
    [[ -z ${statuses[i]:-} ]] || continue
    ! kill -0 "${pids[i]}" 2>/dev/null || continue
    statuses[i]=0
    wait "${pids[i]}" || statuses[i]=$?
    ((statuses[i] == 0)) && continue
    say "process $i ended with status ${statuses[i]}: $folder/$i/log"
    [[ $told == failure ]] && continue
    failed+=("${statuses[i]}")
    failed_at=${failed_at:-$SECONDS}
  done
  # Two seconds, for others that fail of the same cause.
  [[ -z $failed_at || -n $told ]] || ((SECONDS < failed_at + 2)) || tell_all failure
  [[ $told != failure ]] || ((SECONDS < failed_at + 50)) || end_sessions
  sleep 0.1 || true
done
exit "$(combined_status "${failed[@]}")"
