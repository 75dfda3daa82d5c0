#!/usr/bin/env bash
# Trains on Cloud TPU VMs: asks for them, prepares every worker, runs a command on all, gives them back.
usage="scripts/tpu_vm.sh [--dry-run] [--yes] COMMAND

  create            ask for the TPU and wait until it is there
  copy              this repository's tracked files, as they are here, to every worker
  install           Python 3.11, the package, and what lies in TPU_INPUTS, on every worker
  run COMMAND...    start COMMAND on every worker; it goes on when this machine disconnects
  status            of the TPU, and of the run on every worker
  logs [W [S]]      follow the log of worker W of slice S (0 and 0)
  stop              end the run with a last checkpoint (SIGTERM)
  ssh COMMAND...    COMMAND on every worker, waiting for it
  loop COMMAND...   all that until COMMAND has finished: a preempted TPU is asked for again
  delete            give the TPU back

  --dry-run prints the gcloud commands; --yes deletes without asking, at the end of a loop too

Settings, from the environment:
  TPU_PROJECT, TPU_ZONE, TPU_NAME
  TPU_TYPE             as gcloud calls it: v5litepod-64, v6e-32, v5p-128 (cores: 64 chips), v4-64 (32 chips)
  TPU_SLICES=1         slices of that type, joined by the data centre's network
  TPU_SPOT=0           1: cheaper, and may be taken away at any time
  TPU_INPUTS           gs:// folder whose content install copies into the repository's folder on every worker
  TPU_RETRIES=3        crashes of COMMAND after which a loop gives up
  TPU_PREEMPTIONS=50   runs stopped and TPUs lost after which it does
  TPU_CREATE_FLAGS, TPU_SSH_FLAGS   more flags for gcloud, such as --reserved or --internal-ip

Exit codes of COMMAND: 0 ends a loop; so does 2, a mistake that must be mended first; 75 (stopped, or a worker lost) is
tried again TPU_PREEMPTIONS times, any other TPU_RETRIES times, after 1, 2, 4, 8, 8 ... minutes.
Exit codes of this script: 0 done, 2 a mistake of the user or in COMMAND, 1 anything else."
set -euo pipefail
cd "$(dirname "$0")/.."
export CLOUDSDK_CORE_DISABLE_PROMPTS=1

fail() { echo "error: $1" >&2; exit "${2:-2}"; }
note() { echo "$(date +%H:%M:%S) $1" >&2; }
quoted() { printf '%q ' "$@"; }
reason() { grep -m1 ERROR "$1" || tail -n 1 "$1"; } # the line of gcloud's messages that says what is wrong
costs() { echo "$TPU_NAME in $TPU_ZONE costs money until: scripts/tpu_vm.sh delete"; }

gc() { # gcloud, or with --dry-run the command that would run
  if [ "$dry" = 1 ]; then echo "gcloud $(quoted "$@")"; else ${background:+exec} gcloud "$@"; fi
}

settings() {
  local name
  for name in TPU_PROJECT TPU_ZONE TPU_NAME TPU_TYPE; do
    [ -n "${!name:-}" ] || fail "$name is not set (scripts/tpu_vm.sh --help)"
  done
  slices=${TPU_SLICES:-1} spot=${TPU_SPOT:-0} retries=${TPU_RETRIES:-3} preemptions=${TPU_PREEMPTIONS:-50}
  [[ $TPU_NAME =~ ^[a-z]([-a-z0-9]{0,48}[a-z0-9])?$ ]] ||
    fail "TPU_NAME $TPU_NAME: small letters, digits and hyphens, a letter first, 50 at most"
  [[ $slices =~ ^[1-9][0-9]*$ ]] || fail "TPU_SLICES $slices: it must be 1 or more"
  [[ $spot =~ ^[01]$ ]] || fail "TPU_SPOT $spot: it must be 0 or 1"
  [[ $retries/$preemptions =~ ^[0-9]+/[0-9]+$ ]] || fail "TPU_RETRIES and TPU_PREEMPTIONS must be whole numbers"
  [[ ${TPU_INPUTS:-gs://} == gs://* ]] || fail "TPU_INPUTS $TPU_INPUTS: it must begin with gs://"
  case $TPU_TYPE in
    v4-[1-9]*) runtime=tpu-ubuntu2204-base ;;
    v5litepod-[1-9]*) runtime=v2-alpha-tpuv5-lite ;;
    v5p-[1-9]*) runtime=v2-alpha-tpuv5 ;;
    v6e-[1-9]*) runtime=v2-alpha-tpuv6e ;;
    v5e-*) fail "TPU_TYPE $TPU_TYPE: gcloud calls it v5litepod-${TPU_TYPE#v5e-}" ;;
    tpu7x*) fail "TPU_TYPE $TPU_TYPE: it is to be had on GKE only (scripts/gke.sh)" ;;
    *) fail "TPU_TYPE $TPU_TYPE: there are v4-N, v5litepod-N, v5p-N and v6e-N" ;;
  esac
  where=("--project=$TPU_PROJECT" "--zone=$TPU_ZONE")
  nodes=("$TPU_NAME")
  shape=("--accelerator-type=$TPU_TYPE" "--runtime-version=$runtime")
  if [ "$slices" = 1 ]; then
    shape+=("--node-id=$TPU_NAME")
  else # gcloud appends the numbers itself
    shape+=("--node-count=$slices" "--node-prefix=$TPU_NAME")
    nodes=()
    for ((name = 0; name < slices; name++)); do nodes+=("$TPU_NAME-$name"); done
  fi
  [ "$spot" = 0 ] || shape+=(--spot)
  read -ra more <<<"${TPU_CREATE_FLAGS:-}" && shape+=(${more[@]+"${more[@]}"})
  read -ra more <<<"${TPU_SSH_FLAGS:-}" && reach=("${where[@]}" ${more[@]+"${more[@]}"})
  [ "$dry" = 1 ] || command -v gcloud >/dev/null ||
    fail "gcloud is not installed: https://cloud.google.com/sdk/docs/install"
}

state() { # of the TPU; NONE if there is none; fails where that cannot be told
  local get=(compute tpus queued-resources describe "$TPU_NAME" "${where[@]}" '--format=value(state.state)') out
  if [ "$dry" = 1 ]; then
    gc "${get[@]}" >&2
    echo "$pretend"
  elif out=$(gc "${get[@]}" 2>"$scratch/describe"); then
    echo "${out:-UNKNOWN}"
  elif grep -q NOT_FOUND "$scratch/describe"; then
    echo NONE
  else
    note "$(reason "$scratch/describe")"
    return 1
  fi
}

create() {
  local now
  now=$(state) || fail "nothing was asked for: gcloud cannot say whether $TPU_NAME exists"
  [ "$now" = NONE ] || fail "$TPU_NAME exists already ($now): take another TPU_NAME, or scripts/tpu_vm.sh delete"
  request && await
}

request() { # asks for the TPU; of a failed attempt nothing stays
  note "asking for $slices x $TPU_TYPE as $TPU_NAME in $TPU_ZONE"
  asked=1 pretend=ACTIVE
  gc compute tpus queued-resources create "$TPU_NAME" "${where[@]}" "${shape[@]}" 2>"$scratch/create" && return
  asked=0
  # The name was free a moment ago, so what has it now is ours, unless gcloud says that it is not.
  if ! grep -qi 'already.exists' "$scratch/create" && ! remove; then
    fail "$(reason "$scratch/create"); perhaps it was created all the same: $(costs)" 1
  fi
  echo "error: $(reason "$scratch/create")" >&2
  return 2
}

await() { # until the TPU is there
  local now before=
  while :; do
    now=$(state) || now=UNKNOWN
    [ "$now" = "$before" ] || note "$TPU_NAME: $now"
    before=$now
    case $now in
      ACTIVE) return ;;
      NONE | FAILED | SUSPENDING | SUSPENDED | DELETING)
        echo "error: $TPU_NAME was not granted ($now); scripts/tpu_vm.sh delete takes it off the queue" >&2
        return 1 ;;
    esac
    sleep 30
  done
}

remove() { # the TPU, if there is one
  local now
  now=$(state) || return
  [ "$now" = NONE ] && return
  gc compute tpus queued-resources delete "$TPU_NAME" "${where[@]}" --force && return
  now=$(state) && [ "$now" = NONE ] # it went by itself meanwhile
}

delete() {
  local now answer=
  now=$(state) || fail "gcloud cannot say whether $TPU_NAME exists"
  if [ "$now" = NONE ]; then
    note "there is no $TPU_NAME in $TPU_ZONE of $TPU_PROJECT"
    return
  fi
  if [ "$yes$dry" = 00 ]; then
    read -rp "delete $TPU_NAME ($slices x $TPU_TYPE, $now) in $TPU_ZONE of $TPU_PROJECT? [y/N] " answer || true
    [[ $answer == [yY]* ]] || fail "not deleted: $(costs)"
  fi
  remove || fail "not deleted: $(costs)" 1
  note "$TPU_NAME is gone"
}

each() { # each FUNCTION ARGUMENT: on all slices at once; fails if one fails
  local node pids=() status=0 pid
  for node in "${nodes[@]}"; do
    background=1 "$1" "$node" "$2" </dev/null &
    pids+=($!)
  done
  for pid in "${pids[@]}"; do wait "$pid" || status=1; done
  return "$status"
}
node_ssh() { gc compute tpus tpu-vm ssh "$1" "${reach[@]}" --worker=all "--command=$2"; }
node_scp() { gc compute tpus tpu-vm scp "$2" "$1:" "${reach[@]}" --worker=all; }
workers() { each node_ssh "bash llava_jax/scripts/tpu_worker.sh $(quoted "$@")"; }

copy() {
  local commit archive=$scratch/llava_jax.tar.gz unpack
  # The changes to tracked files as a commit that no branch shows; empty if there are none.
  commit=$(git -c user.name=tpu_vm -c user.email=tpu_vm@localhost stash create) || return
  git archive --format=tar.gz -o "$archive" "${commit:-HEAD}" || return
  note "copying $(git rev-parse --short HEAD)${commit:+ with your changes}"
  # The last copy's files go first, so that none stays that is no longer tracked; data and runs are left alone.
  unpack='mkdir -p llava_jax && touch copied && (cd llava_jax && xargs -d "\n" rm -f) < copied &&
tar -xzf llava_jax.tar.gz -C llava_jax && tar -tzf llava_jax.tar.gz | sed "/\/$/d" > copied'
  each node_scp "$archive" && each node_ssh "$unpack"
}

install() {
  note "installing on every worker"
  workers install ${TPU_INPUTS:+"$TPU_INPUTS"}
}

run() {
  [ $# -gt 0 ] || fail "no command to run, such as: python -m llava_jax.train llava_1_5_7b"
  note "starting on every worker: $*"
  # By which the processes of this run know each other.
  workers start env "LLAVA_JAX_SECRET=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')" "$@"
}

status() {
  local now tag host sub code
  now=$(state) || fail "gcloud cannot say whether $TPU_NAME exists"
  echo "$TPU_NAME ($slices x $TPU_TYPE) in $TPU_ZONE: $now"
  [ "$now" = ACTIVE ] || return 0
  workers report | while read -r tag host sub code; do
    case "$tag $sub $code" in
      "worker failed 75") echo "$host: stopped with a checkpoint; the same command goes on" ;;
      "worker failed"*) echo "$host: failed with exit code $code (logs)" ;;
      "worker exited"*) echo "$host: finished" ;;
      "worker dead"*) echo "$host: no run" ;;
      "worker "*) echo "$host: $sub" ;;
      *) echo "$tag $host $sub $code" ;;
    esac
  done
}

verdict() { # of a report: finished, running, stopped, mistake, crashed, or silent if nobody answered
  local tag host sub code finished=0 running=0 stopped=0 mistake=0 crashed=0
  while read -r tag host sub code; do
    case "$tag $sub $code" in
      "worker failed 75") stopped=1 ;;
      "worker failed 2") mistake=1 ;;
      "worker failed"* | "worker dead"*) crashed=1; note "$host: $sub, exit code $code" ;;
      "worker exited"*) finished=1 ;;
      "worker "*) running=1 ;;
    esac
  done <<<"$1"
  # The others of a crashed worker end too, with whatever code; a mistake ends all with 2.
  case $crashed$mistake$running$stopped$finished in
    1*) echo crashed ;;
    01*) echo mistake ;;
    001*) echo running ;;
    0001*) echo stopped ;;
    00001) echo finished ;;
    *) echo silent ;;
  esac
}

watch() { # until the run has ended: sets `ended` to what verdict says, or to lost if the TPU is gone
  local now lines offline=0 silent=0
  while [ "$offline" -lt 60 ]; do
    sleep 60
    now=$(state) || { offline=$((offline + 1)); continue; } # this machine may be offline, the run is not
    offline=0 ended=lost
    [ "$now" = ACTIVE ] || return 0
    lines=$(workers report) || lines=
    if [ "$dry" = 1 ]; then echo "$lines"; lines="worker dry-run exited 0"; fi
    ended=$(verdict "$lines")
    case $ended in
      running) silent=0 ;;
      silent) silent=$((silent + 1)); [ "$silent" -lt 5 ] || return 0 ;;
      *) return 0 ;;
    esac
  done
  fail "gcloud has failed for an hour; the run may go on without this loop: $(costs)" 1
}

loop() {
  local now crashes=0 losses=0 prepared=0
  [ $# -gt 0 ] || fail "no command to run, such as: python -m llava_jax.train llava_1_5_7b"
  now=$(state) || fail "gcloud cannot say whether $TPU_NAME exists"
  if [ "$now" = ACTIVE ] && [ "$(verdict "$(workers report)")" = running ]; then
    note "a run is going on: watching it"
    prepared=1
  fi
  asked=1
  while :; do
    ended=lost
    if [ "$prepared" = 1 ] && [ "$crashes$losses" = 00 ]; then watch; else attempt "$@"; fi
    case $ended in
      finished) note "finished"; settle 0 ;;
      mistake) workers stop || true
        note "exit code 2, a mistake that trying again does not mend: scripts/tpu_vm.sh logs"; settle 2 ;;
      crashed) workers stop || true
        crashes=$((crashes + 1)) ;;
      stopped) losses=$((losses + 1)) ;;
      lost | silent) losses=$((losses + 1)) prepared=0
        [ "$ended" = lost ] || remove || true ;; # the TPU is there, but no worker has answered for five minutes
    esac
    note "$ended; so far $crashes crashes, $losses times stopped or lost"
    [ "$crashes" -le "$retries" ] && [ "$losses" -le "$preemptions" ] || { note "giving up"; settle 1; }
    now=$((crashes + losses))
    sleep $((60 << (now < 4 ? now - 1 : 3))) # 1, 2, 4, 8, 8 ... minutes
  done
}

attempt() { # from whatever there is to a run and its end
  local now
  now=$(state) || return 0
  case $now in
    FAILED | SUSPENDING | SUSPENDED | DELETING) remove || return 0; now=NONE ;; # taken away
  esac
  if [ "$now" = NONE ]; then
    prepared=0
    request || { [ "$crashes$losses" != 00 ] || exit 2; return 0; }
  fi
  await || return 0
  if { [ "$prepared" = 1 ] || { copy && install && prepared=1; }; } && run "$@"; then
    watch
  else
    ended=crashed
    [ "$(state)" = ACTIVE ] || ended=lost
  fi
}

settle() { # ends a loop
  if [ "$yes" = 1 ]; then delete; else note "$(costs)"; fi
  exit "$1"
}

interrupted() {
  # shellcheck disable=SC2046  # several numbers
  kill $(jobs -p) 2>/dev/null || true
  [ "$asked" = 0 ] || echo "interrupted: $(costs)" >&2
  exit 130
}

dry=0 yes=0 asked=0 pretend=ACTIVE
while [[ ${1:-} == --* ]]; do
  case $1 in
    --dry-run) dry=1 ;;
    --yes) yes=1 ;;
    --help) echo "$usage"; exit ;;
    *) fail "$1: no such option (scripts/tpu_vm.sh --help)" ;;
  esac
  shift
done
command=${1:-}
[ $# = 0 ] || shift
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
trap interrupted INT TERM

case $command in
  create | copy | install | status | stop | delete)
    [ $# = 0 ] || fail "$command takes no arguments (--dry-run and --yes go before it)" ;;
  run | ssh | loop | logs) ;;
  "") echo "$usage" >&2; exit 2 ;;
  *) fail "$command: no such command (scripts/tpu_vm.sh --help)" ;;
esac
settings
case $command in
  create) pretend=NONE; create || exit ;;
  loop) pretend=NONE; loop "$@" ;;
  status | delete) "$command" ;;
  copy | install | run) "$command" "$@" || fail "$command did not succeed on every worker (above); $(costs)" 1 ;;
  stop) workers stop || fail "stop did not succeed on every worker (above); $(costs)" 1 ;;
  ssh) each node_ssh "cd llava_jax && source ~/llava_venv/bin/activate && $(quoted "$@")" || exit 1 ;;
  logs) [[ ${1:-0}/${2:-0} =~ ^[0-9]+/[0-9]+$ ]] && [ "${2:-0}" -lt "$slices" ] || fail "logs [WORKER [SLICE]]: numbers"
    gc compute tpus tpu-vm ssh "${nodes[${2:-0}]}" "${reach[@]}" "--worker=${1:-0}" "--command=tail -n 100 -F llava.log" ;;
esac
