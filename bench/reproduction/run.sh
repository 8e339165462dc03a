#!/bin/sh
# From a file of ranked responses to the refiner that ships, its tables and loss curves:
#
#     bench/reproduction/run.sh alpaca_responses.jsonl FOLDER [mt_bench_drafts.jsonl]
#
# Three to four hours on one thread. What FOLDER holds is not trained again, only measured; an interrupted run of engine.train
# goes on from its last checkpoint. The base stages follow the clock, so that their weights differ from run to run.
#
# QUICK=1 in front: every stage in a few steps on a few prompts, to see that they fit together. What comes out is worthless, and
# all of it, results and refiner too, stays in FOLDER.
set -eu
responses=$1 folder=$2 mt_bench=${3:-} quick=${QUICK:-}
python=${PYTHON:-.venv/bin/python}
here=bench/reproduction results=bench/results shipped=engine/refiner_checkpoint
mkdir -p "$folder"
if [ "$quick" ]; then
    [ -e "$folder/responses.jsonl" ] || head -n 100 "$responses" >"$folder/responses.jsonl"
    responses=$folder/responses.jsonl results=$folder shipped=$folder/refiner_checkpoint
fi

# 1. Base models: one that copies and repairs a draft, and one that also writes answers by itself.
base() {
    name=$1 minutes=$2
    shift 2
    [ -e "$folder/$name.done" ] || {
        if [ "$quick" ]; then budget="--steps 3"; else budget="--minutes $minutes"; fi
        # shellcheck disable=SC2086 # two words
        "$python" -m bench.reproduction.base --data "$responses" --out "$folder/$name" $budget "$@"
        touch "$folder/$name.done"
    }
}
base copier-1 38
base copier-2 18 --init "$folder/copier-1" --lr 5e-4 --warmup 50 --mix 0.7
base copier 27 --init "$folder/copier-2" --lr 5e-4 --warmup 50 --mix 0.5
base writer 21 --init "$folder/copier" --lr 5e-4 --warmup 50 --plain 0.5 --seed 3

# 2. Trajectories: python -m engine.trajectories build, held-out prompts apart.
[ -e "$folder/data/repair.jsonl" ] ||
    "$python" -m bench.reproduction.data --responses "$responses" --tokenizer "$folder/copier" --out "$folder/data"

# 3. Plain fine-tuning and DiffPO. A step without drafts is shorter: half as many again take the same tokens.
train() {
    name=$1 model=$2 data=$3
    shift 3
    [ -e "$folder/$name/model" ] ||
        "$python" -m engine.train $here/refiner.yaml model="$folder/$model" data="$folder/data/$data.jsonl" \
            output="$folder/$name" "$@" ${quick:+steps=2}
}
train ar writer train omega=0 drafts=0 steps=423
train omega-0.1 writer train omega=0.1
train omega-1 writer train omega=1
train omega-10 writer train omega=10 steps=70
train omega-1000 writer train omega=1000 steps=40

# The refiner that ships, and what it would be without the consistency loss: each mixed with the copier, as the copier was.
correct() {
    train "corrector-$1" copier corrections steps=400 window=256 lr=3e-4 batch_size=8 micro_batch=1 omega="$@"
    "$python" -m bench.reproduction.ship --model "$folder/corrector-$1/model" --base "$folder/copier" --mix 0.6 \
        --out "$folder/mixed-$1"
}
correct 0 drafts=0
correct 0.2

# 4. What came out of it: steps and similarities, and repairs of drafts.
for name in writer ar omega-0.1 omega-1 omega-10 omega-1000; do
    "$python" -m bench.reproduction.measure "$name=$folder/$name" --data "$folder/data" \
        --results "$results/reproduction.json" ${mt_bench:+--mt-bench "$mt_bench"} ${quick:+--prompts 4}
done
repair() {
    "$python" -m bench.reproduction.repair --name "$1" --model "$folder/$2" --data "$responses" \
        --results "$results/reproduction.json" ${mt_bench:+--real "$mt_bench"} ${quick:+--prompts 4}
}
repair copier copier
repair "omega 0" mixed-0
repair "omega 0.2 (ships)" mixed-0.2
"$python" -m bench.reproduction.table --results "$results/reproduction.json"
"$python" -m bench.reproduction.plot --results "$results/reproduction.json" --out "$results/reproduction_loss.png"

# 5. What ships, with the copier's tokenizer as it was first written.
mkdir -p "$shipped"
for file in chat_template.jinja tokenizer.json tokenizer_config.json; do
    cp "$folder/copier/$file" "$shipped"
done
for file in config.json generation_config.json model.safetensors; do
    cp "$folder/mixed-0.2/$file" "$shipped"
done
