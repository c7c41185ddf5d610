#!/usr/bin/env bash
# Distil a ranker, end to end: a cross-encoder scores candidates once; students learn from its scores, as cross-encoder
# and as bi-encoder, with and without distillation; all are evaluated by reranking held-out candidates.
#
#   TEACHER=models/scifact-teacher STUDENT=models/bert-tiny DATA=data/scifact pipelines/ranking/run.sh
#   SMOKE=1 TEACHER=... STUDENT=... DATA=... pipelines/ranking/run.sh     the same on 30 queries, a few steps
#   SEEDS="0" ... pipelines/ranking/run.sh                                one student of a kind instead of three
#   ENCODERS=cross-encoder STUDENT=models/scifact-teacher ... pipelines/ranking/run.sh --set 'student.keep_layers=[1,3,5]'
#                     options of train-student for all students; here: they start from half of the teacher's layers
#
# DATA holds train.jsonl and test.jsonl (see prepare.py). You can interrupt this and run it again: dumps
# resume, finished students are kept.
set -euo pipefail
cd "$(dirname "$0")/../.."

: "${TEACHER:?a cross-encoder with one output, such as models/scifact-teacher of pipelines/models}"
: "${STUDENT:?a small encoder with the same tokenizer, such as google/bert_uncased_L-2_H-128_A-2}"
: "${DATA:?a folder with train.jsonl and test.jsonl, written by pipelines/ranking/prepare.py}"
OUTPUT=${OUTPUT:-ranking-output}
SEEDS=${SEEDS:-0 1 2}
ENCODERS=${ENCODERS:-cross-encoder bi-encoder}
PYTHON=${PYTHON:-python}
kdcache() { "$PYTHON" -m kdcache "$@"; }
say() { printf '\n== %s\n' "$*"; }

dump_options=(--config pipelines/ranking/dump.yaml --teacher "$TEACHER")
train_options=(--config pipelines/ranking/train.yaml --cache "$OUTPUT/cache" --student "$STUDENT" --resume
    "$@")
select_options=(--documents 8)
if [ -n "${SMOKE:-}" ]; then
    SEEDS=0
    select_options+=(--queries 30)
    dump_options+=(--limit-documents 30)
    train_options+=(--max-steps 4)
fi

# 1. Keep the relevant documents of every training query and a few others: the teacher's time is proportional to them.
"$PYTHON" pipelines/ranking/select.py "$DATA/train.jsonl" "$OUTPUT/train.jsonl" "${select_options[@]}"

# 2. The teacher runs once over each set of pairs. This is the expensive part; afterwards the teacher is not loaded again.
say "Dump the teacher over the training queries"
kdcache dump-teacher "${dump_options[@]}" --corpus "$OUTPUT/train.jsonl" --output "$OUTPUT/cache"
say "Dump the teacher over the candidates to be reranked"
kdcache dump-teacher "${dump_options[@]}" --corpus "$DATA/test.jsonl" --output "$OUTPUT/held-out-cache"
kdcache verify "$OUTPUT/cache" --deep --against-teacher 4 --teacher "$TEACHER"
kdcache peek "$OUTPUT/held-out-cache" --count 2

# 3. Both kinds of student, each with and without the teacher's scores: same start, data, order and steps.
students=()
train() { # NAME SEED OPTIONS...
    students+=(--student "$OUTPUT/$1-seed$2")
    say "Train $1, seed $2"
    kdcache train-student "${train_options[@]}" --output "$OUTPUT/$1-seed$2" --seed "$2" --set "student.seed=$2" "${@:3}"
}
alone=(--set objective.margin_mse=null --set objective.listwise_kl=null --set objective.list_cross_entropy.weight=1)
for seed in $SEEDS; do
    for encoder in $ENCODERS; do
        train "$encoder-alone" "$seed" --set "student.encoder=$encoder" "${alone[@]}"
        train "$encoder-distilled" "$seed" --set "student.encoder=$encoder"
    done
done

# 4. All of them rerank the held-out candidates; the teacher a few of them, for its speed.
say "Held-out queries: the teacher and every kind of student, the mean over seeds"
kdcache evaluate --cache "$OUTPUT/held-out-cache" "${students[@]}" --json -q >"$OUTPUT/evaluation.json"
kdcache evaluate --cache "$OUTPUT/held-out-cache" --student "$TEACHER" --limit-sequences 20 --json -q \
    >"$OUTPUT/speed.json"
"$PYTHON" pipelines/report.py "$OUTPUT/evaluation.json" "$OUTPUT/speed.json" --retained ndcg_at_10 | tee "$OUTPUT/table.md"
