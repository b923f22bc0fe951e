#!/usr/bin/env bash
# Train on all hosts of a Cloud TPU slice (TPU VMs): the same command on every host, over ssh.
#
#   TPU=my-v5e-16 ZONE=us-west4-a launch/tpu_pod.sh --config aspo_math_1p5b \
#     --set Model.path=/mnt/shared/model --set Run.folder=gs://bucket/runs/math
#
# Needs: gcloud, logged in; a TPU slice in state READY; on every host a clone of this repository in
# $FOLDER (~/aspo_jax) with an environment in .venv made by `pip install -e '.[tpu]'`; model and run
# folder on storage that all hosts see. SETUP=1 clones and installs first, from $REPOSITORY.
# JAX finds the hosts in the slice's metadata: no addresses are needed. To stop and save:
#   gcloud compute tpus tpu-vm ssh $TPU --zone=$ZONE --worker=all --command='pkill -TERM -f "[a]spo_jax.train"'
set -euo pipefail

: "${TPU:?set TPU to the name of the slice}" "${ZONE:?set ZONE to its zone}"
folder=${FOLDER:-'~/aspo_jax'}

on_all_hosts() {
  gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all --command="$1"
}

if [[ ${SETUP:-} ]]; then
  : "${REPOSITORY:?set REPOSITORY to the address to clone}"
  on_all_hosts "git clone $(printf %q "$REPOSITORY") $folder && cd $folder &&
    python3 -m venv .venv && .venv/bin/pip install -q -e '.[tpu]'"
fi

flags=$(printf '%q ' "$@") # quoted once more, for the shell of the hosts
on_all_hosts "cd $folder && JAX_PLATFORMS=tpu,cpu .venv/bin/python -m aspo_jax.train $flags"
