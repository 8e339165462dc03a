#!/bin/sh
# From a file of ranked responses to the refiner that ships, its tables and loss curves:
#
#     bench/reproduction/run.sh alpaca_responses.jsonl FOLDER [mt_bench_drafts.jsonl]
#
# Two to three hours on one thread. Every stage is skipped if FOLDER holds its result; an interrupted run of the second stage
# goes on from its last checkpoint. The base stages follow the clock, so that their weights differ from run to run.
set -eu
responses=$1 folder=$2 mt_bench=${3:-}
python=${PYTHON:-.venv/bin/python}
here=bench/reproduction
mkdir -p "$folder"

# 1. Base models: one that copies and repairs a draft, and one that also writes answers by itself.
base() {
    name=$1
    shift
    [ -e "$folder/$name.done" ] || {
        "$python" -m bench.reproduction.base --data "$responses" --out "$folder/$name" "$@"
        touch "$folder/$name.done"
    }
}
base copier-1 --minutes 38
base copier-2 --minutes 18 --init "$folder/copier-1" --lr 5e-4 --warmup 50 --mix 0.7
base copier --minutes 27 --init "$folder/copier-2" --lr 5e-4 --warmup 50 --mix 0.5
base writer --minutes 21 --init "$folder/copier" --lr 5e-4 --warmup 50 --plain 0.5 --seed 3

# 2. Trajectories: python -m engine.trajectories build, held-out prompts apart.
[ -e "$folder/data/repair.jsonl" ] ||
    "$python" -m bench.reproduction.data --responses "$responses" --tokenizer "$folder/copier" --out "$folder/data"

# 3. Plain fine-tuning and DiffPO. A step without drafts is shorter: half as many again take the same tokens.
train() {
    name=$1 model=$2 data=$3
    shift 3
    [ -e "$folder/$name/model" ] ||
        "$python" -m engine.train $here/refiner.yaml model="$folder/$model" data="$folder/data/$data.jsonl" \
            output="$folder/$name" "$@"
}
train ar writer train omega=0 drafts=0 steps=423
train omega-0.1 writer train omega=0.1
train omega-1 writer train omega=1
train omega-10 writer train omega=10 steps=70
train omega-1000 writer train omega=1000 steps=40
train corrector-0 copier train-repair omega=0 drafts=0 lr=5e-5
train corrector-0.1 copier train-repair omega=0.1 lr=5e-5

# 4. What came out of it: steps and similarities, then candidates to ship, stored as they would be.
for name in writer ar omega-0.1 omega-1 omega-10 omega-1000; do
    "$python" -m bench.reproduction.measure "$name=$folder/$name" --data "$folder/data" ${mt_bench:+--mt-bench "$mt_bench"}
done
correct() {
    "$python" -m bench.reproduction.repair --name "$1" --model "$2" --data "$responses" ${mt_bench:+--real "$mt_bench"}
}
correct "copier (ships)" "$folder/copier"
for omega in 0 0.1; do
    "$python" -m bench.reproduction.ship --model "$folder/corrector-$omega/model" --base "$folder/copier" \
        --out "$folder/corrector-$omega-half"
    correct "copier, then omega $omega" "$folder/corrector-$omega-half"
done
"$python" -m bench.reproduction.table
"$python" -m bench.reproduction.plot

# 5. The copier ships: neither candidate repairs held-out drafts better.
mkdir -p engine/refiner_checkpoint
find "$folder/copier" -maxdepth 1 -type f -exec cp {} engine/refiner_checkpoint/ \;
