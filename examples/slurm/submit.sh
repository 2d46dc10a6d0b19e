#!/bin/bash
# A census as a job array, and its merge when every task has succeeded:
#
#   TARGET=mini LAYER=1 SHARDS=8 OUT=/scratch/me/census ./submit.sh
#
# OPTIONS goes to `fra census` ("--heads 3,5 --reduce sum,max --documents texts"), FRA names the command where it is not
# `fra` ("python -m fra"). All nodes must see TARGET, the documents and OUT, and have the same versions installed.
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
mkdir -p "${OUT:?a folder}"
export TARGET LAYER SHARDS OUT
job="$(sbatch --parsable --export=ALL --array="1-${SHARDS:?how many}" "$here/census.sbatch")"
sbatch --export=ALL --dependency="afterok:${job%%;*}" "$here/merge.sbatch"
