#!/usr/bin/env bash
# What tpu_vm.sh does on a worker: install [gs://FOLDER] | start COMMAND... | stop | report. Runs in the home folder.
set -euo pipefail
cd
service=llava.service

get() { systemctl show "$service" --property="$1" --value; }

install() { # the system's Python is 3.10; uv brings its own
  export PATH=$HOME/.local/bin:$PATH
  command -v uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
  uv venv --quiet --allow-existing --python 3.11 llava_venv
  VIRTUAL_ENV=$HOME/llava_venv uv pip install --quiet -e 'llava_jax[tpu]'
  [ $# = 0 ] || gcloud storage rsync --recursive "$1" llava_jax
}

# As a service the command outlives the connection. On a stop or a shutdown of the machine its first process alone gets
# SIGTERM (KillMode=mixed; data workers that got it too would break off the data before the last checkpoint), and gets it
# while there still is a network (After=).
start() {
  if [ "$(get SubState)" = running ]; then
    echo "$(hostname): a run is going on here; stop it first" >&2
    exit 1
  fi
  (umask 077 && : >llava_run) # the command's secret is nobody else's
  {
    echo "source ~/llava_venv/bin/activate"
    echo "export PYTHONUNBUFFERED=1"
    echo "exec $(printf '%q ' "$@")" # no shell stays between the service and the command
  } >llava_run
  sudo tee "/etc/systemd/system/$service" >/dev/null <<END
[Unit]
Description=llava_jax
After=network-online.target

[Service]
User=$(id -un)
WorkingDirectory=$HOME/llava_jax
ExecStart=/bin/bash $HOME/llava_run
StandardOutput=append:$HOME/llava.log
StandardError=inherit
RemainAfterExit=yes
KillMode=mixed
TimeoutStopSec=900
OOMPolicy=continue
LimitMEMLOCK=infinity
LimitNOFILE=1048576
END
  sudo systemctl daemon-reload
  sudo systemctl restart "$service"
}

stop() { sudo systemctl stop "$service"; }

report() { # worker HOST STATE EXIT_CODE; STATE is systemd's: running, exited (0), failed, dead (never begun, or rebooted)
  local code
  code=$(get ExecMainStatus)
  [ "$(get ExecMainCode)" = 1 ] || code=$((128 + code)) # ended by a signal
  echo "worker $(hostname) $(get SubState) $code"
}

"$@"
