#!/usr/bin/env bash
# Distil an encoder-decoder, end to end: papers' abstracts in, titles out. Students of three of the teacher's eight
# layers, with and without distillation, same start and steps, are compared by loss and by the titles that they write.
#
#   TEACHER=google/flan-t5-small DATA=data/scitldr pipelines/seq2seq_lm/run.sh
#   SMOKE=1 TEACHER=... DATA=... pipelines/seq2seq_lm/run.sh     the same on a few papers, a few steps
#   SEEDS="0" TEACHER=... DATA=... pipelines/seq2seq_lm/run.sh   one student of a kind instead of three
#   WRITTEN=1 ...   also students that learn from titles which the teacher wrote (sequence-level distillation)
#   ADAPT=0 ...     for a teacher that has learnt the task already
#
# DATA holds train.jsonl and test.jsonl (see prepare.py). You can interrupt this and run it again: dumps
# and texts resume, finished students are kept.
set -euo pipefail
cd "$(dirname "$0")/../.."

: "${TEACHER:?an encoder-decoder of eight layers, such as google/flan-t5-small}"
: "${DATA:?a folder with train.jsonl and test.jsonl, written by pipelines/seq2seq_lm/prepare.py}"
OUTPUT=${OUTPUT:-seq2seq-output}
SEEDS=${SEEDS:-0 1 2}
ADAPT=${ADAPT:-1}
PYTHON=${PYTHON:-python}
kdcache() { "$PYTHON" -m kdcache "$@"; }
say() { printf '\n== %s\n' "$*"; }

dump_options=(--config pipelines/seq2seq_lm/dump.yaml)
train_options=(--config pipelines/seq2seq_lm/train.yaml --resume)
adapt_options=(--resume)
papers=600 held_out=200 texts=100
if [ -n "${SMOKE:-}" ]; then
    SEEDS=0 WRITTEN=1 papers=12 held_out=8 texts=4
    train_options+=(--max-steps 2)
    adapt_options+=(--max-steps 2)
fi
dump() { # TEACHER CORPUS PAPERS CACHE OPTIONS...
    kdcache dump-teacher "${dump_options[@]}" --teacher "$1" --corpus "$2" --limit-documents "$3" --output "$4" "${@:5}"
}

# 1. Adapt a teacher that was trained for another task: all of its weights, one epoch, by cross-entropy. It is trained as a
#    student that starts from itself. Cross-entropy needs the titles only, so the cache keeps one id.
if [ "$ADAPT" != 0 ]; then
    say "Adapt the teacher to titles of papers"
    dump "$TEACHER" "$DATA/train.jsonl" "$papers" "$OUTPUT/titles" --top-k 1
    kdcache train-student "${adapt_options[@]}" --cache "$OUTPUT/titles" --student "$TEACHER" \
        --output "$OUTPUT/teacher" --set objective.forward_kl=null --set objective.cross_entropy.weight=1
    TEACHER=$OUTPUT/teacher
fi

# 2. The teacher runs once over each corpus.
say "Dump the teacher over training and held-out papers"
dump "$TEACHER" "$DATA/train.jsonl" "$papers" "$OUTPUT/cache"
dump "$TEACHER" "$DATA/test.jsonl" "$held_out" "$OUTPUT/held-out-cache"
kdcache verify "$OUTPUT/cache" --deep --against-teacher 4 --teacher "$TEACHER"
if [ -n "${WRITTEN:-}" ]; then
    say "Let the teacher write titles itself, and dump it over those"
    kdcache write-targets --teacher "$TEACHER" --corpus "$DATA/train.jsonl" --limit-documents "$papers" \
        --text-field abstract --column target=title --max-length 128 --max-target-length 32 --beams 4 \
        --output "$OUTPUT/written.jsonl"
    dump "$TEACHER" "$OUTPUT/written.jsonl" "$papers" "$OUTPUT/written-cache" \
        --set 'corpus.columns={input: input, target: target}'
fi

# 3. Students with the same start, order and steps: on the corpus's titles alone, with the teacher's distribution at each
#    token, and with that distribution on titles that the teacher wrote.
students=()
train() { # NAME SEED CACHE OPTIONS...
    students+=(--student "$OUTPUT/$1-seed$2")
    say "Train $1, seed $2"
    kdcache train-student "${train_options[@]}" --cache "$3" --student "$TEACHER" --output "$OUTPUT/$1-seed$2" \
        --seed "$2" "${@:4}"
}
for seed in $SEEDS; do
    train alone "$seed" "$OUTPUT/cache" --set objective.forward_kl=null --set objective.cross_entropy.weight=1
    train distilled "$seed" "$OUTPUT/cache"
    if [ -n "${WRITTEN:-}" ]; then
        train written "$seed" "$OUTPUT/written-cache"
    fi
done

# 4. All of them on held-out papers. The teacher is evaluated as a student too, because the cache does not hold what it writes.
say "Held-out papers: the teacher and every kind of student, the mean over seeds"
kdcache evaluate --cache "$OUTPUT/held-out-cache" --student "$TEACHER" "${students[@]}" --generate "$texts" \
    --json -q >"$OUTPUT/evaluation.json"
"$PYTHON" pipelines/report.py "$OUTPUT/evaluation.json" --retained chrf | tee "$OUTPUT/table.md"
