#!/usr/bin/env bash
# What only a GPU can tell, in at most 8 minutes: benchmarks/speed/gpu.sh OUT
# OUT gets JSON files; benchmarks/speed/gpu_report.py OUT puts them into benchmarks/README.md.
# benchmarks/speed/gpu.sh OUT --smoke tries everything in small on the CPU.
set -uo pipefail
out=$(mkdir -p "$1" && cd "$1" && pwd)
here=$(cd "$(dirname "$0")" && pwd)
export PYTHONPATH="$here/../..${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
python=${PYTHON:-python3}
end=$((SECONDS + 470))

if [ "${2:-}" = --smoke ]; then
    device=cpu models=(tiny) ranks=(2) steps=20 interval=4 size=(--batch 2 --length 8)
    dtype=float32 sweeps=(smoke) only=(IncreLoRA) planted=(--width 16 --seeds 1 --steps 60 --contenders lora paper)
else
    device=cuda models=(deberta-v3-base llama-1b) ranks=(2 8 64) steps=80 interval=16 size=(--batch 32 --length 128)
    dtype=bfloat16 sweeps=(r_avg rounds) only=("no adapter (floor)" IncreLoRA "IncreLoRA, paper")
    planted=(--width 512 --seeds 1 2 3 4 5 6 7 8 9 10 --steps 1600 --jobs 5 --contenders lora adalora paper default)
fi

failed=0
run() { # NAME ARGUMENTS...: within what is left of the time; a failure does not stop the rest
    local name=$1 left=$((end - SECONDS))
    shift
    if [ "$left" -lt 5 ]; then
        echo "$name: no time left" | tee "$out/$name.log"
        return
    fi
    timeout "$left" "$python" "$@" > "$out/$name.log" 2>&1
    local status=$?
    echo "$name: exit $status after ${SECONDS} s"
    [ "$status" -eq 0 ] || [ "$status" -eq 124 ] || failed=1
}

run fp16-resume "$here/fp16_resume.py" --device "$device" --json "$out/fp16-resume.json"
for model in "${models[@]}"; do
    for rank in "${ranks[@]}"; do
        run "step-$model-$rank" "$here/step_time.py" --model "$model" --device "$device" --dtype "$dtype" "${size[@]}" \
            --r_avg "$rank" --increment "$(((rank + 1) / 2))" --steps "$steps" --interval "$interval" --score_tolerance 0.2 \
            --only "${only[@]}" --json "$out/step-$model-$rank.json"
    done
done
run scaling "$here/scaling.py" --device "$device" --dtype "$dtype" --sweeps "${sweeps[@]}" --json "$out/scaling.json"
run planted "$here/../evidence/planted_ranks.py" run --device "$device" --results "$out/planted.jsonl" "${planted[@]}"
exit "$failed"
