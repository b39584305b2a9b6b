#!/usr/bin/env bash
# DATA='PATH/{00000..00999}.tar' HELD_OUT='PATH/{01000..01009}.tar' bash runs/small.sh
#
# QLIP-B-16-256 on one GPU of 80 GB: two trainings of about a day each (estimate), far fewer samples than the paper's.
# Start it again after any stop: what is finished is skipped, what was interrupted goes on from its newest checkpoint.
set -euo pipefail

DATA="${DATA:?set DATA to img2dataset shards of at least 8 tar files}"
HELD_OUT="${HELD_OUT:?set HELD_OUT to shards that are not trained on}"
MIM="${MIM:-weights/eva02_B_pt_in21k_p14.pt}"       # docs/import_eva.md says where these come from
CLIP="${CLIP:-weights/EVA02_CLIP_B_psz16_s8B.pt}"
VGG="${VGG:-weights/vgg16-397923af.pth}"            # torchvision's VGG-16, for LPIPS
START="${START:-starts/b16}"
OUT="${OUT:-runs/small}"

[[ -d "$START" ]] || qlip import eva "$MIM" "$START" --text-from "$CLIP"
qlip data inspect "$DATA" --limit 1000

qlip train qlip_b_16_256_small --data.train "$DATA" --task.init "$START" --out "$OUT/stage1"
qlip eval "$OUT/stage1/export" --data "$HELD_OUT" --evals reconstruction --json "$OUT/stage1.json"

qlip train qlip_b_16_256_stage2_small --data.train "$DATA" --task.init "$OUT/stage1/export" --task.vgg-weights "$VGG" \
  --out "$OUT/stage2"
qlip eval "$OUT/stage2/export" --data "$HELD_OUT" --evals reconstruction --json "$OUT/stage2.json"
qlip export "$OUT/stage2" "$OUT/model"
