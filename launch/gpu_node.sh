#!/usr/bin/env bash
# Train on one machine with NVIDIA GPUs: one process, all of its GPUs (or CUDA_VISIBLE_DEVICES).
#
#   launch/gpu_node.sh --config aspo_math_1p5b --set Model.path=/models/DeepSeek-R1-Distill-Qwen-1.5B
#
# Needs: an NVIDIA driver for CUDA 12, `pip install 'aspo_jax[cuda]'` (or PYTHON=...), and a mesh
# whose sizes multiply to the number of GPUs (Runtime.data = -1, the default, takes what is left).
# Stop with Ctrl-C or SIGTERM: the run is saved, status 75; the same command goes on.
set -euo pipefail

python=${PYTHON:-python}
command -v nvidia-smi >/dev/null || { echo "nvidia-smi not found: no NVIDIA driver here" >&2; exit 2; }
nvidia-smi --query-gpu=index,name,memory.total --format=csv,noheader >&2

# JAX falls back to the CPU in silence where its CUDA plugin is missing; a run must not.
export JAX_PLATFORMS=${JAX_PLATFORMS:-cuda,cpu}
"$python" -c 'import jax; print(f"{jax.device_count()} GPU(s), jax {jax.__version__}")' >&2 ||
  { echo "JAX sees no GPU; pip install 'aspo_jax[cuda]' into $python" >&2; exit 2; }

exec "$python" -m aspo_jax.train "$@"
