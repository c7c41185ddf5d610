#!/usr/bin/env bash
# Distil a model of text embeddings, end to end: dump the teacher once, train students with and without it, evaluate all
# of them by sentence similarity (STS-B) and by search (SciFact), on held-out pairs and queries.
#
#   TEACHER=sentence-transformers/all-MiniLM-L6-v2 DATA=folder pipelines/embedding/run.sh
#   SMOKE=1 TEACHER=... DATA=... pipelines/embedding/run.sh      the same on a few hundred texts, a few steps
#   SEEDS="0" ... pipelines/embedding/run.sh                     one student of a kind instead of three
#   CONFIG=pipelines/embedding/narrow.yaml STUDENT=google/bert_uncased_L-2_H-128_A-2 ...    a narrower student
#   pipelines/embedding/run.sh --set 'student.keep_layers=[1,3,5,7,9,11]'    options of train-student for all students
#
# DATA holds stsb_en and scifact (see prepare.py). You can interrupt this and run it again: dumps
# resume, finished students are kept.
set -euo pipefail
cd "$(dirname "$0")/../.."

: "${TEACHER:?a model of sentence-transformers, such as sentence-transformers/all-MiniLM-L6-v2}"
: "${DATA:?a folder with stsb_en and scifact, see pipelines/embedding/prepare.py}"
STUDENT=${STUDENT:-$TEACHER} # some of its layers: see train.yaml
CONFIG=${CONFIG:-pipelines/embedding/train.yaml}
OUTPUT=${OUTPUT:-embedding-output}
SEEDS=${SEEDS:-0 1 2}
SEARCH_LENGTH=${SEARCH_LENGTH:-64} # tokens that are read of a document for search; 256 takes four times as long
PYTHON=${PYTHON:-python}
kdcache() { "$PYTHON" -m kdcache "$@"; }
say() { printf '\n== %s\n' "$*"; }

# 1. Texts. The teacher reads as many training rows as the students will, at most.
train_rows=2500
dump_options=(--config pipelines/embedding/dump.yaml --teacher "$TEACHER")
train_options=(--config "$CONFIG" --student "$STUDENT" --cache "$OUTPUT/cache" --resume "$@")
test_options=()
prepare_options=()
if [ -n "${SMOKE:-}" ]; then
    SEEDS=0
    train_rows=200
    train_options+=(--max-steps 5)
    test_options+=(--limit-documents 100)
    prepare_options+=(--queries 20 --documents 100)
fi
"$PYTHON" pipelines/embedding/prepare.py "$OUTPUT/data" --data "$DATA" "${prepare_options[@]}"

# 2. The teacher runs once over each set of texts, and is not loaded again.
say "Dump the teacher over the training texts"
kdcache dump-teacher "${dump_options[@]}" --corpus "$OUTPUT/data/train.jsonl" --limit-documents "$train_rows" \
    --output "$OUTPUT/cache"
say "Dump the teacher over the test pairs"
kdcache dump-teacher "${dump_options[@]}" "${test_options[@]}" --corpus "$OUTPUT/data/sts_test.jsonl" \
    --output "$OUTPUT/sts-cache"
say "Dump the teacher over the queries and the documents to be searched"
kdcache dump-teacher "${dump_options[@]}" --max-length "$SEARCH_LENGTH" --corpus "$OUTPUT/data/queries.jsonl" \
    --corpus "$OUTPUT/data/corpus.jsonl" --output "$OUTPUT/search-cache"
kdcache verify "$OUTPUT/cache" --deep
kdcache inspect "$OUTPUT/cache"

# 3. Every student twice: same start, data, order and steps. "alone" learns from the corpus: the scores of pairs, and which
#    title belongs to which abstract. "distilled" learns from the teacher's embeddings only.
students=()
train() { # NAME SEED OPTIONS...
    students+=(--student "$OUTPUT/$1-seed$2")
    say "Train $1, seed $2"
    kdcache train-student "${train_options[@]}" --output "$OUTPUT/$1-seed$2" --seed "$2" --set "student.seed=$2" "${@:3}"
}
alone=(--set objective.output_cosine=null --set objective.similarity_matrix=null)
alone+=(--set objective.contrastive.weight=1 --set objective.label_cosine.weight=1)
alone+=(--set objective.label_cosine.label_scale=5)
for seed in $SEEDS; do
    train alone "$seed" "${alone[@]}"
    train distilled "$seed"
done

# 4. All of them on the test pairs and on the search. The teacher is evaluated as a student too, to measure its speed.
say "Test pairs and search: the teacher and both kinds of student, the mean over seeds"
kdcache evaluate --cache "$OUTPUT/sts-cache" --student "$TEACHER" "${students[@]}" --json -q >"$OUTPUT/sts.json"
kdcache evaluate --cache "$OUTPUT/search-cache" "${students[@]}" --qrels "$OUTPUT/data/qrels.tsv" --id-column _id \
    --json -q >"$OUTPUT/search.json"
"$PYTHON" pipelines/report.py "$OUTPUT/sts.json" "$OUTPUT/search.json" --retained spearman | tee "$OUTPUT/table.md"
