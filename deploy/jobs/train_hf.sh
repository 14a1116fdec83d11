#!/usr/bin/env bash
# Trains a recipe of the paper with Hugging Face Jobs and uploads the model to a private repository:
#   hf auth login
#   deploy/jobs/train_hf.sh vlm2vec-llava16 OWNER/my-embedder [--dry-run]
# Further words are options of `hf jobs run`. The data is the hub's MMEB-train, mounted read-only. The run is kept in the
# bucket OWNER/vlm2vec-runs (hf buckets create OWNER/vlm2vec-runs), so a second start continues. FLAVOR: 8 GPUs of 80 GB or
# more.
set -euo pipefail

recipe=${1:?a recipe: vlm2vec-phi35v, vlm2vec-llava16 or vlm2vec-v2-qwen2vl}
repository=${2:?OWNER/NAME of the model}
owner=${repository%%/*}

# shellcheck disable=SC2016  # expanded inside the job
script='set -euo pipefail
pip install --quiet "vlm2vec[train]"
words=("$RECIPE" data.root=/data "output=/runs/$RECIPE")
if compgen -G "/runs/$RECIPE/checkpoints/*" >/dev/null; then words+=(--resume); fi
torchrun --standalone --nproc-per-node 8 -m vlm2vec.cli train "${words[@]}"
vlm2vec verify "/runs/$RECIPE"
vlm2vec push "/runs/$RECIPE" "$REPOSITORY"'

hf jobs run --detach --flavor "${FLAVOR:-a100x8}" --timeout 48h \
  --env RECIPE="$recipe" --env REPOSITORY="$repository" --secrets HF_TOKEN \
  --volume hf://datasets/TIGER-Lab/MMEB-train:/data \
  --volume "hf://buckets/$owner/vlm2vec-runs:/runs" \
  "${@:3}" python:3.11-bookworm bash -c "$script"
