#!/usr/bin/env bash
# Progressive distillation: easy texts first, and a falling temperature. Compare with the same student without either.
#
#   pipelines/progressive/run.sh                  uses the caches of `make demo`, or makes them
#   SMOKE=1 pipelines/progressive/run.sh          the same in two minutes, on a few documents
#   TEACHER=HuggingFaceTB/SmolLM2-360M CORPUS=texts/ HELD_OUT=held-out/ OUTPUT=runs/mine pipelines/progressive/run.sh
#
# You can interrupt this and run it again: dumps resume, finished students are kept.
set -euo pipefail
cd "$(dirname "$0")/../.."

OUTPUT=${OUTPUT:-demo-output}
PYTHON=${PYTHON:-python}
kdcache() { "$PYTHON" -m kdcache "$@"; }
say() { printf '\n== %s\n' "$*"; }

# 1. Teacher and texts are those of pipelines/causal_lm.
embedded=$("$PYTHON" pipelines/causal_lm/prepare.py "$OUTPUT/corpus")
if [ -z "${TEACHER:-}${CORPUS:-}" ]; then
    export HF_HUB_OFFLINE=1 # nothing is fetched
fi
TEACHER=${TEACHER:-${embedded:?}}
if [ -z "${CORPUS:-}" ]; then
    CORPUS=$OUTPUT/corpus/train.jsonl
    HELD_OUT=$OUTPUT/corpus/held_out.jsonl
fi
: "${HELD_OUT:?give texts that are not trained on, as CORPUS is given}"

dump_options=(--config pipelines/causal_lm/dump.yaml --teacher "$TEACHER")
train_options=(--cache "$OUTPUT/cache" --resume)
if [ -n "${SMOKE:-}" ]; then
    dump_options+=(--limit-documents 8)
    train_options+=(--student-size nano --max-steps 20)
fi

# 2. One cache serves both students. If pipelines/causal_lm has run with this OUTPUT, it is finished.
say "Dump the teacher over the training texts and the held-out texts"
kdcache dump-teacher "${dump_options[@]}" --corpus "$CORPUS" --output "$OUTPUT/cache"
kdcache dump-teacher "${dump_options[@]}" --corpus "$HELD_OUT" --output "$OUTPUT/held-out-cache"

# 3. The difficulty of every sequence is in the cache already: its table holds the teacher's loss. Nothing is computed.
say "What the run would do"
kdcache train-student --config pipelines/progressive/progressive.yaml "${train_options[@]}" \
    --output "$OUTPUT/student-progressive" --dry-run

# 4. The same student twice, same initialisation, texts and steps: all mixed at temperature 1, and progressively.
say "Train on shuffled texts at temperature 1"
kdcache train-student --config pipelines/causal_lm/train.yaml "${train_options[@]}" --output "$OUTPUT/student-kd"
say "Train progressively"
kdcache train-student --config pipelines/progressive/progressive.yaml "${train_options[@]}" \
    --output "$OUTPUT/student-progressive"

# 5. Both against the teacher, on held-out texts.
say "Held-out texts: teacher, plain student, progressive student"
kdcache evaluate --cache "$OUTPUT/held-out-cache" --student "$OUTPUT/student-kd" \
    --student "$OUTPUT/student-progressive" --markdown | tee "$OUTPUT/progressive.md"
