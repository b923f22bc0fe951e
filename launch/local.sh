#!/usr/bin/env bash
# Train with several processes on this machine, over loopback: a rehearsal of many hosts.
#
#   launch/local.sh PROCESSES [flags of python -m aspo_jax.train]
#   JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=2 launch/local.sh 2 --config countdown_quick
#
# Needs: bash 5.1, python with aspo_jax (or PYTHON=...). Each process takes all devices it sees:
# meant for CPUs; for the GPUs of one machine gpu_node.sh needs one process only.
# Ends: with the first status that is not 0. When a process fails the others are killed; SIGTERM,
# SIGINT and SIGHUP are passed on, so that all of them save and stop with status 75.
set -uo pipefail

[[ ${1:-} =~ ^[1-9][0-9]*$ ]] || { echo "usage: $0 PROCESSES [flags]" >&2; exit 2; }
processes=$1
shift
python=${PYTHON:-python}
port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])') || exit

export ASPO_COORDINATOR=127.0.0.1:$port ASPO_NUM_PROCESSES=$processes
export JAX_COORDINATOR_BIND_ADDRESS=$ASPO_COORDINATOR # not for the network to see

running=()
for ((i = 0; i < processes; i++)); do
  ASPO_PROCESS_ID=$i "$python" ${PROGRAM:--m aspo_jax.train} "$@" &
  running+=($!)
done
trap 'kill -TERM "${running[@]}" 2>/dev/null' TERM INT HUP
trap 'kill -KILL "${running[@]}" 2>/dev/null' EXIT

status=0
while ((${#running[@]})); do
  wait -n -p ended "${running[@]}"
  ended_with=$?
  [[ -n ${ended:-} ]] || continue # a signal woke us, not a process
  for i in "${!running[@]}"; do
    [[ ${running[i]} != "$ended" ]] || unset "running[$i]"
  done
  ((status)) || status=$ended_with
  if ((ended_with != 0 && ended_with != 75 && ${#running[@]})); then
    sleep 3 # they may be saying the same thing
    kill -KILL "${running[@]}" 2>/dev/null
  fi
done
exit "$status"
