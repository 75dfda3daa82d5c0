#!/usr/bin/env bash
# Trains on TPU slices of Google Kubernetes Engine, as a JobSet (scripts/gke_jobset.yaml) of one pod for each host.
usage="scripts/gke.sh COMMAND

  render COMMAND...   print the manifest
  start COMMAND...    create the JobSet; it restarts after preemptions and crashes until COMMAND has finished
  status              of the JobSet and its pods
  logs [W [S]]        follow the log of worker W of slice S (0 and 0)
  stop                delete the JobSet, after a last checkpoint (SIGTERM); start goes on from there

Settings, from the environment; kubectl's context says which cluster:
  GKE_NAME            of the JobSet
  GKE_TPU             v4, v5e, v5p, v6e or tpu7x: the node pools' chips, four to a machine (ct5lp-hightpu-4t ...)
  GKE_TOPOLOGY        of a slice, such as 8x8 (v5e, v6e) or 4x4x4 (v4, v5p, tpu7x)
  GKE_SLICES=1        slices, each a node pool
  GKE_IMAGE           with the package in it: git archive HEAD | docker build -t IMAGE -f scripts/Dockerfile -
  GKE_INPUTS          gs:// folder whose content every pod copies and finds in its folder
  GKE_RETRIES=10      restarts after crashes; those after preemptions are not counted

Exit codes: 0 done, 2 a mistake of the user, 1 anything else."
set -euo pipefail
cd "$(dirname "$0")/.."

fail() { echo "error: $1" >&2; exit "${2:-2}"; }

settings() {
  local name size dimensions=""
  for name in "$@"; do
    [ -n "${!name:-}" ] || fail "$name is not set (scripts/gke.sh --help)"
  done
  slices=${GKE_SLICES:-1} retries=${GKE_RETRIES:-10}
  [[ $GKE_NAME =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] ||
    fail "GKE_NAME $GKE_NAME: small letters, digits and hyphens, a letter first, 40 at most"
  [[ $slices =~ ^[1-9][0-9]*$ ]] || fail "GKE_SLICES $slices: it must be 1 or more"
  [[ $retries =~ ^[0-9]+$ ]] || fail "GKE_RETRIES $retries: it must be a whole number"
  [ $# -gt 1 ] || return 0
  case $GKE_TPU in
    v4) accelerator=tpu-v4-podslice dimensions=3 ;;
    v5e) accelerator=tpu-v5-lite-podslice dimensions=2 ;;
    v5p) accelerator=tpu-v5p-slice dimensions=3 ;;
    v6e) accelerator=tpu-v6e-slice dimensions=2 ;;
    tpu7x) accelerator=tpu7x dimensions=3 ;;
    *) fail "GKE_TPU $GKE_TPU: there are v4, v5e, v5p, v6e and tpu7x" ;;
  esac
  [[ $GKE_TOPOLOGY =~ ^[1-9][0-9]*(x[1-9][0-9]*){$((dimensions - 1))}$ ]] ||
    fail "GKE_TOPOLOGY $GKE_TOPOLOGY: $GKE_TPU has $dimensions dimensions, such as $([ $dimensions = 2 ] && echo 8x8 || echo 4x4x4)"
  size=$((${GKE_TOPOLOGY//x/ * }))
  chips=$((size < 4 ? size : 4)) hosts=$(((size + 3) / 4))
  [ $((chips * hosts)) = "$size" ] || fail "GKE_TOPOLOGY $GKE_TOPOLOGY: its $size chips are not four to a machine"
  [ "$slices" = 1 ] || [ "$hosts" -gt 1 ] || fail "GKE_TOPOLOGY $GKE_TOPOLOGY: slices to be joined have two machines or more"
  [[ $GKE_INPUTS == gs://* ]] || fail "GKE_INPUTS $GKE_INPUTS: it must begin with gs://"
}

json() { # a string of YAML; Kubernetes would replace $(NAME), so that is escaped too
  local text=$1
  text=${text//\\/\\\\}
  text=${text//\"/\\\"}
  text=${text//$'\n'/\\n}
  text=${text//$'\t'/\\t}
  text=${text//"\$("/"\$\$("}
  [[ $text != *[[:cntrl:]]* ]] || fail "a setting or argument holds a control character: $(printf %q "$1")"
  printf '"%s"' "$text"
}

fill() { manifest=${manifest//"\${$1}"/"$2"}; }

render() {
  local word image inputs manifest arguments=""
  [ $# -gt 0 ] || fail "no command to run, such as: python -m llava_jax.train llava_1_5_7b"
  settings GKE_NAME GKE_TPU GKE_TOPOLOGY GKE_IMAGE GKE_INPUTS
  image=$(json "$GKE_IMAGE") inputs=$(json "$GKE_INPUTS")
  for word in "$@"; do
    word=$(json "$word")
    arguments+=${arguments:+, }$word
  done
  manifest=$(<scripts/gke_jobset.yaml)
  fill NAME "$GKE_NAME"
  fill RETRIES "$retries"
  fill SLICES "$slices"
  fill HOSTS "$hosts"
  fill CHIPS "$chips"
  fill ACCELERATOR "$accelerator"
  fill TOPOLOGY "$GKE_TOPOLOGY"
  fill IMAGE "$image"
  fill INPUTS "$inputs"
  fill SECRET "$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')"
  fill COMMAND "$arguments" # the last: what it holds is not filled in again
  echo "$manifest"
}

cluster() { # kubectl, and JobSet in the cluster
  command -v kubectl >/dev/null || fail "kubectl is not installed: gcloud components install kubectl gke-gcloud-auth-plugin"
  local error
  error=$(kubectl get crd jobsets.jobset.x-k8s.io 2>&1 >/dev/null) && return
  [[ $error != *NotFound* ]] || fail "the cluster has no JobSet (0.10.1 or newer): https://jobset.sigs.k8s.io/docs/installation"
  fail "kubectl: ${error##*$'\n'}"
}

command=${1:-}
[ $# = 0 ] || shift
case $command in
  --help) echo "$usage" ;;
  "") echo "$usage" >&2; exit 2 ;;
  render) render "$@" ;;
  start)
    manifest=$(render "$@")
    cluster
    kubectl create -f - <<<"$manifest" || fail "nothing was started (above); what has this name goes with: scripts/gke.sh stop" 1 ;;
  status)
    settings GKE_NAME
    cluster
    kubectl get jobset "$GKE_NAME" || exit 1
    kubectl get pods --output=wide "--selector=jobset.sigs.k8s.io/jobset-name=$GKE_NAME" ;;
  logs)
    settings GKE_NAME
    [[ ${1:-0}/${2:-0} =~ ^[0-9]+/[0-9]+$ ]] || fail "logs [WORKER [SLICE]]: numbers"
    cluster
    selector=jobset.sigs.k8s.io/jobset-name=$GKE_NAME,jobset.sigs.k8s.io/job-index=${2:-0}
    kubectl logs --follow --tail=100 --container=train \
      "--selector=$selector,batch.kubernetes.io/job-completion-index=${1:-0}" ;;
  stop)
    settings GKE_NAME
    cluster
    kubectl delete jobset "$GKE_NAME" --ignore-not-found || fail "$GKE_NAME may still run" 1
    echo "$GKE_NAME is gone; its node pools stay and cost money until: gcloud container node-pools delete" >&2 ;;
  *) fail "$command: no such command (scripts/gke.sh --help)" ;;
esac
