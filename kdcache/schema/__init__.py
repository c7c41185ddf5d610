"""Records: what flows between the layers and what stands in the manifest.

Shape suffixes used throughout kdcache: N sequences, T tokens, P positions (rows), K kept ids, J sampled ids, G grid
temperatures, V vocabulary, D width, B batch, L positions of one padded sequence. Logarithms are natural; losses and
entropies are in nats.

Two kinds of records live here. Dataclasses hold arrays in memory (`Targets`, `Sequence`, `SequenceBatch`);
frozen pydantic models (`Plan`, `ShardRecord`, `Manifest`) are written as JSON and describe a cache completely.
"""

from kdcache.schema.batches import (
    NO_LABEL,
    Document,
    FloatArray,
    IntArray,
    Samples,
    Sequence,
    SequenceBatch,
    Targets,
    token_hash,
)
from kdcache.schema.records import (
    FORMAT_VERSION,
    KINDS,
    KNOWN_FEATURES,
    OUTPUTS_FIELD,
    SCALARS,
    STATISTICS_COLUMNS,
    ArrayRecord,
    CorpusRecord,
    EndpointIdentity,
    FieldRecord,
    ImportIdentity,
    Kind,
    Manifest,
    ObjectRecord,
    OutputsRecord,
    Plan,
    Record,
    ShardRecord,
    Statistics,
    TargetsRecord,
    TeacherRecord,
    TokenizerRecord,
    WeightsIdentity,
    layer_field,
    public_name,
)

__all__ = [
    "FORMAT_VERSION",
    "KINDS",
    "KNOWN_FEATURES",
    "NO_LABEL",
    "OUTPUTS_FIELD",
    "SCALARS",
    "STATISTICS_COLUMNS",
    "ArrayRecord",
    "CorpusRecord",
    "Document",
    "EndpointIdentity",
    "FieldRecord",
    "FloatArray",
    "ImportIdentity",
    "IntArray",
    "Kind",
    "Manifest",
    "ObjectRecord",
    "OutputsRecord",
    "Plan",
    "Record",
    "Samples",
    "Sequence",
    "SequenceBatch",
    "ShardRecord",
    "Statistics",
    "Targets",
    "TargetsRecord",
    "TeacherRecord",
    "TokenizerRecord",
    "WeightsIdentity",
    "layer_field",
    "public_name",
    "token_hash",
]
