#!/bin/bash
# The same two steps on one machine, without Slurm, one shard after another:
#
#   TARGET=mini LAYER=1 SHARDS=3 OUT=build/census ./loop.sh
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
mkdir -p "${OUT:?a folder}"
export TARGET LAYER SHARDS OUT
for k in $(seq "${SHARDS:?how many}"); do
    SLURM_ARRAY_TASK_ID="$k" bash "$here/census.sbatch"
done
bash "$here/merge.sbatch"
