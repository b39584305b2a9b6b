#!/usr/bin/env bash
# bash runs/demo.sh
#
# The whole system at tiny size on two CPU cores, about eight minutes; ends in OUT/report.html. Start it again to resume.
set -euo pipefail

OUT="${OUT:-runs/demo}"

qlip demo --out "$OUT"
qlip export "$OUT/stage2" "$OUT/model"
