#!/usr/bin/env bash
# Distil a causal language model, end to end: dump the teacher once, train two students for the same steps, compare.
#
#   pipelines/causal_lm/run.sh                    the demo (`make demo` sets up the environment and calls this)
#   SMOKE=1 pipelines/causal_lm/run.sh            the same in two minutes, on a few documents
#   TEACHER=HuggingFaceTB/SmolLM2-360M CORPUS=texts/ HELD_OUT=held-out/ OUTPUT=runs/mine pipelines/causal_lm/run.sh
#
# You can interrupt this and run it again: dumps resume, finished students are kept.
set -euo pipefail
cd "$(dirname "$0")/../.."

OUTPUT=${OUTPUT:-demo-output}
PYTHON=${PYTHON:-python}
kdcache() { "$PYTHON" -m kdcache "$@"; }
say() { printf '\n== %s\n' "$*"; }

# 1. Teacher and texts. Without your own, the embedded teacher and CPython's language reference are used.
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
train_options=(--config pipelines/causal_lm/train.yaml --resume)
if [ -n "${SMOKE:-}" ]; then
    dump_options+=(--limit-documents 8)
    train_options+=(--student-size nano --max-steps 20)
fi

# 2. The teacher runs once over each corpus. This is the expensive part; afterwards the teacher is not loaded again.
say "Dump the teacher over the training texts"
kdcache dump-teacher "${dump_options[@]}" --corpus "$CORPUS" --output "$OUTPUT/cache"
say "Dump the teacher over the held-out texts"
kdcache dump-teacher "${dump_options[@]}" --corpus "$HELD_OUT" --output "$OUTPUT/held-out-cache"

# 3. Check the cache against the teacher, and look into it.
say "Verify the cache: every byte, every row, and 4 sequences against the teacher"
kdcache verify "$OUTPUT/cache" --deep --against-teacher 4 --teacher "$TEACHER"
kdcache inspect "$OUTPUT/cache"
kdcache peek "$OUTPUT/held-out-cache" --count 2

# 4. The same student twice, same initialisation, data, order and steps: without the teacher's targets, and with them.
say "Train by cross-entropy alone"
kdcache train-student "${train_options[@]}" --cache "$OUTPUT/cache" --output "$OUTPUT/student-ce" \
    --set objective.forward_kl=null --set objective.cross_entropy.weight=1
say "Train by distillation"
kdcache train-student "${train_options[@]}" --cache "$OUTPUT/cache" --output "$OUTPUT/student-kd"

# 5. Both against the teacher, on held-out texts.
say "Held-out texts: teacher, cross-entropy student, distilled student"
kdcache evaluate --cache "$OUTPUT/held-out-cache" --student "$OUTPUT/student-ce" --student "$OUTPUT/student-kd" \
    --markdown | tee "$OUTPUT/table.md"
kdcache inspect "$OUTPUT/cache" | grep -E '^(size|bytes/token|positions)'
