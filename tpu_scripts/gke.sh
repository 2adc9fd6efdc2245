#!/usr/bin/env bash
# gke.sh render NAME --image=IMAGE --accelerator=A --topology=T [flags] -- --config=FILE --workdir=gs://... [more]
# gke.sh apply NAME   (with the same flags)
# gke.sh logs NAME [--slice=I] [--worker=I] [--follow]
# gke.sh delete NAME
#
# A run on GKE, as the JobSet of jobset.yaml. render prints it filled in; apply gives it to kubectl. A job set that has
# ended does not run again: delete it first, then apply goes on from the last save.
#
#   --image=IMAGE         holds the checkout in /rlhf_jax with rlhf_jax[tpu] installed
#   --accelerator=A       as tpu-v5-lite-podslice, tpu-v5p-slice, tpu-v6e-slice
#   --topology=T          of one slice, as 4x4 or 2x2x4
#   --chips=N             chips of one host (4)
#   --slices=N            slices (1)
#   --restarts=N          restarts of the whole set after a stop or a crash (10)
#   --service-account=S   Kubernetes service account that may write to the bucket (default)
#   --namespace=N         Kubernetes namespace (default)
#   --slice=I, --worker=I whose log (0, 0)
#   --follow              go on printing the log
#   --dry-run             print the command and run none
#   --help                print this

source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
given=("$@")
parse 'image= accelerator= topology= chips= slices= restarts= service-account= namespace= slice= worker= follow' "$@"
need 2 'an action and a NAME are'
action=${args[0]}
name=${args[1]}
valid_name "$name" NAME
namespace=${flag[namespace]:-default}
valid_name "$namespace" --namespace
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

# A JSON string, which YAML reads too.
json() {
  local text=$1
  text=${text//\\/\\\\}
  text=${text//\"/\\\"}
  text=${text//$'\n'/\\n}
  text=${text//$'\t'/\\t}
  text=${text//$'\r'/\\r}
  [[ ! $text =~ [[:cntrl:]] ]] || die "an argument holds a control character: $(quoted "$1")"
  printf '"%s"' "$text"
}

# The worker's arguments as a JSON list. Kubernetes reads $(NAME) in them, and $$ as one $.
worker_args() {
  local arg list='"--"'
  for arg in "$@"; do list+=", $(json "${arg//\$/\$\$}")"; done
  printf '[%s]' "$list"
}

# fill NAME VALUE: puts a value in the place of @NAME@ in `manifest`.
fill() {
  manifest=${manifest//"@$1@"/"$2"}
}

render() {
  local wanted chips hosts slices restarts image args
  for wanted in image accelerator topology; do
    [[ -n ${flag[$wanted]:-} ]] || die "--$wanted is needed: see gke.sh --help"
  done
  [[ ${flag[topology]} =~ ^[1-9][0-9]*(x[1-9][0-9]*){1,2}$ ]] || die "--topology=${flag[topology]}: as 4x4 or 2x2x4"
  valid_name "${flag[accelerator]}" --accelerator
  valid_name "${flag[service-account]:-default}" --service-account
  chips=$(whole_number chips 4 1)
  slices=$(whole_number slices 1 1)
  restarts=$(whole_number restarts 10)
  hosts=$((${flag[topology]//x/*}))
  ((hosts % chips == 0)) || die "--topology=${flag[topology]} is $hosts chips, not a multiple of --chips=$chips a host"
  hosts=$((hosts / chips))
  image=$(json "${flag[image]}")
  args=$(worker_args "${rest[@]}")

  manifest=$(<"$here/jobset.yaml")
  fill NAME "$name"
  fill NAMESPACE "$namespace"
  fill SLICES "$slices"
  fill HOSTS "$hosts"
  fill CHIPS "$chips"
  fill RESTARTS "$restarts"
  fill SERVICE_ACCOUNT "${flag[service-account]:-default}"
  fill ACCELERATOR "${flag[accelerator]}"
  fill TOPOLOGY "\"${flag[topology]}\""
  fill IMAGE "$image"
  fill ARGS "$args"  # the last: what the user wrote is not filled in itself
  printf '%s\n' "$manifest"
}

case $action in
  render) render ;;
  apply)
    manifest=$(render)
    if [[ -n ${flag[dry-run]:-} ]]; then
      given[0]=render
      printf '%s | ' "$(quoted bash "$here/gke.sh" "${given[@]}")"
    fi
    run kubectl apply --namespace="$namespace" --filename=- <<<"$manifest"
    ;;
  logs)
    labels=jobset.sigs.k8s.io/jobset-name=$name
    labels+=,jobset.sigs.k8s.io/job-index=$(whole_number slice 0)
    labels+=,batch.kubernetes.io/job-completion-index=$(whole_number worker 0)
    run kubectl logs --namespace="$namespace" --selector="$labels" --tail=-1 ${flag[follow]:+--follow}
    ;;
  delete) run kubectl delete jobset "$name" --namespace="$namespace" --ignore-not-found ;;
  *) die "unknown action \"$action\": render, apply, logs or delete" ;;
esac
