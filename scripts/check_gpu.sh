#!/usr/bin/env bash
# What is checked on a GPU before a release: the GPU tests, the demo, and 20 steps of a
# Llama-8B with random weights through `lorax train`, with and without recomputation.
#
#   scripts/check_gpu.sh COMMIT CALL OUT
#
# Needs the packages of pyproject.toml in `python3`, 40 GiB of disk, and an 80 GB GPU or larger.
# Appends one row per run to OUT/step_h200.jsonl.
set -euo pipefail
commit=$1 call=$2 out=$3
cd "$(dirname "$0")/.."
export PYTHONPATH=.:kernels${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
scratch=$(mktemp -d)
lorax() { python3 -m lorax.cli "$@"; }

echo "== GPU tests"
python3 -m pytest -q -m gpu -p no:cacheprovider 2>&1 | tee "$out/gpu_tests.log" | tail -15

echo "== Demo"
lorax train configs/tiny_cpu.yaml save.output_dir="$scratch/demo" 2>&1 | tee "$out/demo.log" | tail -45

echo "== Llama-8B"
time python3 -m scripts.make.random_checkpoint llama-8b "$scratch/8b" --tokenizer examples/tiny/model
for policy in full none; do
    run="$scratch/run_$policy"
    lorax train configs/llama3_8b_lora.yaml \
        model.name_or_path="$scratch/8b" data.train=examples/tiny/data/pretrain.jsonl \
        train.max_steps=20 train.per_device_train_batch_size=4 train.gradient_accumulation_steps=1 \
        train.learning_rate=1e-3 train.gradient_checkpointing=$policy save.save_steps=1000 \
        save.output_dir="$run" 2>&1 | tee "$out/train_8b_$policy.log" | grep -v '^  ' | tail -40
    python3 -m scripts.bench.record "$run" --model llama-8b --call "$call" --commit "$commit" \
        --out "$out/step_h200.jsonl"
done
