#!/usr/bin/env bash
# Distil a classifier or a regressor of texts, end to end: dump the teacher once, train a small student without it and
# with it, evaluate both on held-out texts.
#
#   TEACHER=models/sst2-teacher STUDENT=models/bert-tiny-mlm DATA=data/sst2 pipelines/sequence_classification/run.sh
#   KIND=stsb TEACHER=models/stsb-teacher STUDENT=... DATA=data/stsb pipelines/sequence_classification/run.sh
#   SMOKE=1 TEACHER=... STUDENT=... DATA=... pipelines/sequence_classification/run.sh    the same on 64 texts, 4 steps
#   SEEDS="0" ... pipelines/sequence_classification/run.sh                               one student of a kind, not three
#   STUDENT=models/sst2-teacher ... pipelines/sequence_classification/run.sh --set 'student.keep_layers=[1,3,5]'
#                                     options of train-student for all students; here: they start from half a teacher
#
# DATA holds train.jsonl and test.jsonl (see prepare.py). You can interrupt this and run it again: dumps
# resume, finished students are kept.
set -euo pipefail
cd "$(dirname "$0")/../.."

KIND=${KIND:-sst2}
: "${TEACHER:?a classifier (or for KIND=stsb a regressor), such as models/sst2-teacher of pipelines/models}"
: "${STUDENT:?a small encoder with the same tokenizer, such as google/bert_uncased_L-2_H-128_A-2}"
: "${DATA:?a folder with train.jsonl and test.jsonl, written by pipelines/sequence_classification/prepare.py}"
OUTPUT=${OUTPUT:-$KIND-output}
SEEDS=${SEEDS:-0 1 2}
PYTHON=${PYTHON:-python}
kdcache() { "$PYTHON" -m kdcache "$@"; }
say() { printf '\n== %s\n' "$*"; }

case $KIND in
sst2)
    task=sequence-classification retained=top1_accuracy
    alone=(--set objective.forward_kl=null --set objective.cross_entropy.weight=1)
    ;;
stsb)
    task=sequence-regression retained=spearman
    alone=(--set objective.output_mse=null --set objective.label_mse.weight=1)
    ;;
*) say "KIND must be sst2 or stsb, found $KIND" >&2 && exit 2 ;;
esac
dump_options=(--config pipelines/sequence_classification/dump.yaml --task "$task" --teacher "$TEACHER")
train_options=(--config "pipelines/sequence_classification/$KIND.yaml" --cache "$OUTPUT/cache" --student "$STUDENT"
    --resume "$@")
if [ -n "${SMOKE:-}" ]; then
    SEEDS=0
    dump_options+=(--limit-documents 64)
    train_options+=(--max-steps 4)
fi

# 1. The teacher runs once over each set of texts, and is not loaded again.
say "Dump the teacher over the training texts"
kdcache dump-teacher "${dump_options[@]}" --corpus "$DATA/train.jsonl" --output "$OUTPUT/cache"
say "Dump the teacher over the held-out texts"
kdcache dump-teacher "${dump_options[@]}" --corpus "$DATA/test.jsonl" --output "$OUTPUT/held-out-cache"
kdcache verify "$OUTPUT/cache" --deep --against-teacher 4 --teacher "$TEACHER"
kdcache peek "$OUTPUT/held-out-cache" --count 2

# 2. The same student on labels alone and with the teacher: same start (also of its new head), data, order and steps.
students=()
train() { # NAME SEED OPTIONS...
    students+=(--student "$OUTPUT/$1-seed$2")
    say "Train $1, seed $2"
    kdcache train-student "${train_options[@]}" --output "$OUTPUT/$1-seed$2" --seed "$2" --set "student.seed=$2" "${@:3}"
}
for seed in $SEEDS; do
    train student-alone "$seed" "${alone[@]}"
    train student-distilled "$seed"
done

# 3. All of them on the held-out texts. The teacher is evaluated as a student too, to measure its speed.
say "Held-out texts: the teacher and both kinds of student, the mean over seeds"
kdcache evaluate --cache "$OUTPUT/held-out-cache" --student "$TEACHER" "${students[@]}" --json -q \
    >"$OUTPUT/evaluation.json"
"$PYTHON" pipelines/report.py "$OUTPUT/evaluation.json" --retained "$retained" | tee "$OUTPUT/table.md"
