#!/usr/bin/env bash
# Distil without the Trainer: a PyTorch loop over the batches of a cache. Compare its student with that of the Trainer.
#
#   pipelines/bare_loop/run.sh                    uses the caches of `make demo`, or makes them
#   SMOKE=1 pipelines/bare_loop/run.sh            the same in two minutes, on a few documents
#   TEACHER=HuggingFaceTB/SmolLM2-360M CORPUS=texts/ HELD_OUT=held-out/ OUTPUT=runs/mine pipelines/bare_loop/run.sh
#
# You can interrupt this and run it again: dumps and students resume.
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
size=tiny
steps=300
if [ -n "${SMOKE:-}" ]; then
    dump_options+=(--limit-documents 8)
    size=nano
    steps=20
fi

# 2. If pipelines/causal_lm has run with this OUTPUT, both caches are finished and stay as they are.
say "Dump the teacher over the training texts and the held-out texts"
kdcache dump-teacher "${dump_options[@]}" --corpus "$CORPUS" --output "$OUTPUT/cache"
kdcache dump-teacher "${dump_options[@]}" --corpus "$HELD_OUT" --output "$OUTPUT/held-out-cache"

# 3. The loop, and the Trainer with the same settings. They see the same batches and end with the same student.
say "Train in a loop of our own"
"$PYTHON" pipelines/bare_loop/train.py "$OUTPUT/cache" "$OUTPUT/student-bare" --size "$size" --steps "$steps"
say "Train with the Trainer"
kdcache train-student --cache "$OUTPUT/cache" --output "$OUTPUT/student-trainer" --student-size "$size" \
    --max-steps "$steps" --device cpu --resume

# 4. Both on held-out texts.
say "Held-out texts: teacher, student of the loop, student of the Trainer"
kdcache evaluate --cache "$OUTPUT/held-out-cache" --student "$OUTPUT/student-bare" \
    --student "$OUTPUT/student-trainer" --markdown | tee "$OUTPUT/bare_loop.md"
