"""The corpus: read documents and cut them into token sequences (imports neither torch nor transformers)."""

from kdcache.corpus.documents import TEXT, Corpus, CorpusConfig, Role, load_corpus
from kdcache.corpus.layout import assign_shards
from kdcache.corpus.sequences import Encoder, SequenceConfig, SequencePlan, plan_sequences

__all__ = [
    "TEXT",
    "Corpus",
    "CorpusConfig",
    "Encoder",
    "Role",
    "SequenceConfig",
    "SequencePlan",
    "assign_shards",
    "load_corpus",
    "plan_sequences",
]
