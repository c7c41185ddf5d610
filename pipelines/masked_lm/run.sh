#!/usr/bin/env bash
# Distil a masked language model, end to end: dump the teacher once, start students from every third of its layers, train
# them without the teacher's targets and with them, evaluate both on held-out texts.
#
#   TEACHER=models/rxnfp-mlm DATA=data/uspto50k pipelines/masked_lm/run.sh
#   SMOKE=1 TEACHER=... DATA=... pipelines/masked_lm/run.sh        the same on 32 texts, 4 steps
#   SEEDS="0" ... pipelines/masked_lm/run.sh                       one student of a kind, not three
#   TEXTS=5000 HELD_OUT_TEXTS=2000 ... pipelines/masked_lm/run.sh  more texts than the default
#   ADAPT=0 ... pipelines/masked_lm/run.sh                         for a teacher that knows such texts already
#
# DATA holds train.jsonl and test.jsonl (see prepare.py); any texts with a field "text" do. You can interrupt this and
# run it again: dumps resume, finished students are kept.
set -euo pipefail
cd "$(dirname "$0")/../.."

: "${TEACHER:?a masked language model of twelve layers, such as models/rxnfp-mlm of pipelines/models}"
: "${DATA:?a folder with train.jsonl and test.jsonl, such as pipelines/masked_lm/prepare.py writes}"
STUDENT=${STUDENT:-$TEACHER} # the model whose layers the student starts from
OUTPUT=${OUTPUT:-masked-lm-output}
TEXTS=${TEXTS:-2500}
HELD_OUT_TEXTS=${HELD_OUT_TEXTS:-1000}
ADAPT=${ADAPT:-1}
ADAPT_TEXTS=${ADAPT_TEXTS:-1000}
SEEDS=${SEEDS:-0 1 2}
PYTHON=${PYTHON:-python}
kdcache() { "$PYTHON" -m kdcache "$@"; }
say() { printf '\n== %s\n' "$*"; }

train_options=(--config pipelines/masked_lm/train.yaml --cache "$OUTPUT/cache" --student "$STUDENT" --resume)
adapt_options=(--resume --set batch_sequences=16 --learning-rate 2e-4)
if [ -n "${SMOKE:-}" ]; then
    SEEDS=0 TEXTS=32 HELD_OUT_TEXTS=32 ADAPT_TEXTS=32
    train_options+=(--max-steps 4)
    adapt_options+=(--max-steps 2)
fi
dump_options=(--config pipelines/masked_lm/dump.yaml --task masked-lm)

# 1. Adapt a teacher that was trained on other texts: all of its weights, by cross-entropy. (The one of the README predicts
#    unknown words for a few kinds of token, with high confidence.) It is trained as a student that starts from itself.
#    Cross-entropy needs the masked tokens only, so the cache keeps one id.
if [ "$ADAPT" != 0 ]; then
    say "Adapt the teacher to the texts"
    kdcache dump-teacher "${dump_options[@]}" --teacher "$TEACHER" --corpus "$DATA/train.jsonl" \
        --output "$OUTPUT/hidden-tokens" --limit-documents "$ADAPT_TEXTS" --set sequences.replicas=1 --top-k 1
    kdcache train-student "${adapt_options[@]}" --cache "$OUTPUT/hidden-tokens" --student "$TEACHER" \
        --output "$OUTPUT/teacher" --set objective.forward_kl=null --set objective.cross_entropy.weight=1
    TEACHER=$OUTPUT/teacher
fi

# 2. The teacher runs once over each set of texts, and is not loaded again. Masks are drawn now and stay as they are;
#    the held-out texts need no replicas.
dump_options+=(--teacher "$TEACHER")
say "Dump the teacher over the training texts"
kdcache dump-teacher "${dump_options[@]}" --corpus "$DATA/train.jsonl" --output "$OUTPUT/cache" \
    --limit-documents "$TEXTS"
say "Dump the teacher over the held-out texts"
kdcache dump-teacher "${dump_options[@]}" --corpus "$DATA/test.jsonl" --output "$OUTPUT/held-out-cache" \
    --limit-documents "$HELD_OUT_TEXTS" --set sequences.replicas=1
kdcache verify "$OUTPUT/cache" --deep --against-teacher 4 --teacher "$TEACHER"
kdcache peek "$OUTPUT/held-out-cache" --count 2

# 3. The same student on the masked tokens alone and with the teacher: same start, masks, order and steps.
students=()
train() { # NAME SEED OPTIONS...
    students+=(--student "$OUTPUT/$1-seed$2")
    say "Train $1, seed $2"
    kdcache train-student "${train_options[@]}" --output "$OUTPUT/$1-seed$2" --seed "$2" --set "student.seed=$2" "${@:3}"
}
for seed in $SEEDS; do
    train student-alone "$seed" --set objective.forward_kl=null --set objective.cross_entropy.weight=1
    train student-distilled "$seed"
done

# 4. All of them on the held-out texts. The teacher is evaluated as a student too, to measure its speed.
say "Held-out texts: the teacher and both kinds of student, the mean over seeds"
kdcache evaluate --cache "$OUTPUT/held-out-cache" --student "$TEACHER" "${students[@]}" --json -q \
    >"$OUTPUT/evaluation.json"
"$PYTHON" pipelines/report.py "$OUTPUT/evaluation.json" --retained top1_accuracy | tee "$OUTPUT/table.md"
