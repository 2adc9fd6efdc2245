#!/usr/bin/env bash
# create.sh NAME --type=TYPE [flags]
#
# Asks for TPU slices by a queued resource and waits until they are ACTIVE. Run it again whenever you like: an ACTIVE one
# is left, a pending one is waited for, a FAILED or SUSPENDED one (a spot slice that was preempted) is made anew.
#
#   --type=TYPE             accelerator type, as v4-32, v5litepod-16, v5p-32, v6e-16
#   --zone=Z, --project=P   default: TPU_ZONE and TPU_PROJECT, else gcloud's config
#   --version=V             runtime version; default: the one for the type
#   --slices=N              slices of that type (1)
#   --spot                  cheaper, and may be preempted
#   --valid-until=DURATION  give up when it has not been granted for so long, as 6h
#   --no-wait               return once it is asked for
#   --every=SECONDS         how often to look while waiting (15)
#   --dry-run               print the commands, as for a NAME that does not exist, and run none
#   --help                  print this

source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse 'type= zone= project= version= slices= spot valid-until= no-wait every=' "$@"
need 1 'one NAME is'
name=${args[0]}
valid_name "$name" NAME
slices=$(whole_number slices 1 1)
every=$(whole_number every 15)
[[ -n ${flag[type]:-} ]] || die '--type=TYPE is needed, as --type=v5litepod-16'
type=${flag[type]}

case $type in
  v2-* | v3-* | v4-*) version=tpu-ubuntu2204-base ;;
  v5litepod-*) version=v2-alpha-tpuv5-lite ;;
  v5p-*) version=v2-alpha-tpuv5 ;;
  v6e-*) version=v2-alpha-tpuv6e ;;
  *) version= ;;
esac
version=${flag[version]:-$version}
[[ -n $version ]] || die "no runtime version is known for --type=$type: give --version=V"

request=(gcloud compute tpus queued-resources create "$name" "${where[@]}"
  --accelerator-type="$type" --runtime-version="$version")
if [[ $slices -eq 1 ]]; then
  request+=(--node-id="$name")
else
  request+=(--node-count="$slices" --node-prefix="$name")
fi
[[ -z ${flag[spot]:-} ]] || request+=(--spot)
[[ -z ${flag[valid-until]:-} ]] || request+=(--valid-until-duration="${flag[valid-until]}")

requested='' shown=''
while true; do
  ask_state "$name"
  if [[ $answer != "$shown" ]]; then
    say "$name: ${answer:-gone}"
    shown=$answer
  fi
  case $answer in
    ACTIVE) exit 0 ;;
    FAILED | SUSPENDED)
      [[ -z $requested ]] || die "$name is $answer: gcloud compute tpus queued-resources describe $name says why" 1
      run gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet
      continue
      ;;
    '')
      if [[ -z $requested ]]; then
        run "${request[@]}"
        requested=1
        [[ -z ${flag[no-wait]:-} ]] || exit 0
        continue
      fi
      [[ -z ${flag[dry-run]:-} ]] || exit 0
      ;;
    DELETING | SUSPENDING) ;;  # on its way to be made anew
    *) [[ -z ${flag[no-wait]:-} ]] || exit 0 ;;
  esac
  sleep "$every"
done
