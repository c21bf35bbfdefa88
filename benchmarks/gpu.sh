#!/usr/bin/env bash
# Measure everything that needs a GPU, with one command, and collect the results in one folder to send.
#
#     benchmarks/gpu.sh                          # about 45 minutes; needs the packages of requirements-dev.txt
#     benchmarks/gpu.sh --micro_batch 16         # a GPU with 24 GB; the default, 64, needs 80, because build-nanogpt does
#     benchmarks/gpu.sh --dry_run                # all parts with tiny settings, on any machine: what CI runs
#
# --out DIR: the folder of the results (default: benchmarks/out/gpu)
# --peer DIR: a checkout of build-nanogpt (default: it is cloned)
# --source TEXT: what to train on, as fineweb.py takes it (default: FineWeb-Edu from the Hub)
# --hellaswag FILE: the rows of HellaSwag (default: they are downloaded)
# A part that fails does not stop the others. The exit code is 1 if one has failed.
set -uo pipefail
start=$PWD
cd "$(dirname "$0")/.." || exit 2

dry_run="" out=benchmarks/out/gpu peer="" source=HuggingFaceFW/fineweb-edu:sample-10BT hellaswag="" micro_batch=64
while [ $# -gt 0 ]; do
    case $1 in
        --dry_run) dry_run=yes && shift ;;
        --out | --peer | --source | --hellaswag | --micro_batch)
            [ $# -gt 1 ] || { echo "error: $1 needs a value" >&2 && exit 2; }
            case $1 in --out | --peer | --hellaswag) [[ $2 = /* ]] || set -- "$1" "$start/$2" "${@:3}" ;; esac
            declare "${1#--}=$2" && shift 2 ;;
        *) sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' benchmarks/gpu.sh >&2 && exit 2 ;;
    esac
done
mkdir -p "$out" && out=$(cd "$out" && pwd) && rm -f "$out/summary.txt" || exit 2
data=$(dirname "$out")/gpu_data # beside the results, because it is too large to send
failed=0

part() { # part NAME EXIT_CODE COMMAND…: run a command, keep its output, and note whether it ends with this exit code
    local name=$1 expected=$2 start=$SECONDS code result=ok
    shift 2
    echo "== $name: $*"
    "$@" > "$out/$name.txt" 2>&1
    code=$?
    [ $code -eq "$expected" ] || { failed=1 result="failed, exit code $code" && tail -n 5 "$out/$name.txt" >&2; }
    echo "$name: $result, $((SECONDS - start)) s" | tee -a "$out/summary.txt"
}

machine() {
    git describe --always --dirty
    nvidia-smi || echo "no NVIDIA GPU"
    python -m torch.utils.collect_env
}

training() { # the recipe, until a signal stops it; what the GPU does meanwhile is noted every ten seconds
    local watcher="" code columns=timestamp,utilization.gpu,memory.used,power.draw,clocks.sm,temperature.gpu
    if command -v nvidia-smi > /dev/null; then
        nvidia-smi --query-gpu=$columns --format=csv -l 10 > "$out/gpu.csv" &
        watcher=$!
    fi
    timeout --preserve-status "$1" python train_gpt2.py --data_dir "$data" --out_dir "$data.run" --overwrite "${@:2}"
    code=$?
    [ -z "$watcher" ] || kill "$watcher"
    cp "$data.run/log.txt" "$data.run/curve.png" "$out"
    return $code
}

part machine 0 machine
if [ -z "$peer" ]; then
    peer=peers/build-nanogpt
    [ -d "$peer" ] || part clone 0 git clone https://github.com/karpathy/build-nanogpt "$peer"
fi
if [ -z "$hellaswag" ]; then
    hellaswag=hellaswag/hellaswag_val.jsonl
    [ -f "$hellaswag" ] || part hellaswag 0 python -c "import hellaswag; hellaswag.find_rows(hellaswag.FILE)"
fi
common=(--out_dir "$out" --source "$source") once=(--repetitions 1)
if [ -n "$dry_run" ]; then
    export TORCHDYNAMO_DISABLE=1 # nothing is compiled: ten rungs and peers would take minutes
    common=(--out_dir "$out" --source stdlib --preset demo --steps 4)
    tests=(--collect-only) shape=() ladder=() batch=() rows=(--rows 2 --n_layer 1)
    shards=(--source stdlib --encoding bytes --max_tokens 400000 --shard_tokens 100000)
    stopped=0 training=(300 --preset demo --max_steps 3 --warmup_steps 1 --val_tokens 1000 --max_new_tokens 3)
else
    tests=() shape=(--micro_batch "$micro_batch") ladder=(--micro_batch $((micro_batch < 16 ? micro_batch : 16))) rows=(--rows 600)
    batch=(--total_batch_tokens 524288 --steps 12)
    shards=(--source "$source" --max_tokens 100000000 --shard_tokens 10000000)
    stopped=75 training=(600)
fi
part tests 0 python -m pytest -n 0 -m gpu "${tests[@]}"
part step 0 python benchmarks/step.py "${common[@]}" "${shape[@]}" --profile
part ladder 0 python benchmarks/ladder.py "${common[@]}" "${once[@]}" "${ladder[@]}"
part peers 0 python benchmarks/peers.py "${common[@]}" "${once[@]}" "${shape[@]}" "${batch[@]}" --peer "$peer"
part hellaswag_speed 0 python benchmarks/hellaswag_speed.py --out_dir "$out" "${once[@]}" "${rows[@]}" \
    --peer "$peer" --file "$hellaswag" --device auto
part shards 0 python fineweb.py --out_dir "$data" "${shards[@]}"
part training "$stopped" training "${training[@]}"
echo "The results are in $out: please send this folder. $data and $data.run can be deleted."
exit $failed
