#!/usr/bin/env bash
# DATA='PATH/{00000..12895}.tar' HELD_OUT='PATH/{00000..00049}.tar' bash runs/qlip_b_16_256.sh
#
# The paper's pipeline for B-16: import, stage 1, stage 2, evaluation, export. On the GPUs of this machine (a batch of
# 65,536 is then accumulated, which takes weeks), or with CLUSTER=1 on the nodes that runs/qlip.slurm asks for.
# Start it again after any stop: what is finished is skipped, what was interrupted goes on from its newest checkpoint.
set -euo pipefail

DATA="${DATA:?set DATA to img2dataset shards, at least 8 per GPU}"
HELD_OUT="${HELD_OUT:?set HELD_OUT to shards that are not trained on}"
MIM="${MIM:-weights/eva02_B_pt_in21k_p14.pt}"       # docs/import_eva.md says where these come from
CLIP="${CLIP:-weights/EVA02_CLIP_B_psz16_s8B.pt}"
VGG="${VGG:-weights/vgg16-397923af.pth}"            # torchvision's VGG-16, for LPIPS
START="${START:-starts/b16}"
OUT="${OUT:-runs/qlip_b_16_256}"
GPUS="${GPUS:-8}"                                   # of this machine
CLUSTER="${CLUSTER:-0}"                             # 1: train through Slurm

train() {
  if [[ "$CLUSTER" == 1 ]]; then
    sbatch --wait runs/qlip.slurm "$@"
  else
    torchrun --standalone --nproc-per-node "$GPUS" --max-restarts 3 --no-python qlip train "$@"
  fi
}

[[ -d "$START" ]] || qlip import eva "$MIM" "$START" --text-from "$CLIP"
qlip data inspect "$DATA" --limit 1000

train qlip_b_16_256 --data.train "$DATA" --task.init "$START" --out "$OUT/stage1"
qlip eval "$OUT/stage1/export" --data "$HELD_OUT" --evals reconstruction --max-samples 50000 --json "$OUT/stage1.json"

train qlip_b_16_256_stage2 --data.train "$DATA" --task.init "$OUT/stage1/export" --task.vgg-weights "$VGG" \
  --out "$OUT/stage2"
qlip eval "$OUT/stage2/export" --data "$HELD_OUT" --evals reconstruction --max-samples 50000 --json "$OUT/stage2.json"
qlip export "$OUT/stage2" "$OUT/model" --layout official
