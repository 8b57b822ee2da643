#!/bin/sh
# The three commands on a tiny model and a few generated drives; `make demo` runs this. Offline, CPU only.
set -eu
out=${1:-demo}
rm -rf "$out"
python -m alpacache.alpamayo.tiny_checkpoint "$out/Tiny-R1"
alpacache extract synthetic:24 --split train --model "$out/Tiny-R1" --store "$out/train" --frames 2
alpacache extract synthetic:80 --split val --model "$out/Tiny-R1" --store "$out/val" --frames 2
alpacache train --store "$out/train" --val "$out/val" --model "$out/Tiny-R1" --out "$out/run" \
  --steps 100 --batch-size 4 --lr 2e-3 --warmup 10 --in-memory
alpacache eval --store "$out/val" --model "$out/Tiny-R1" --checkpoint "$out/run" --out "$out/eval"
