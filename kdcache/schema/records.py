"""Records: the frozen models that a cache's JSON files hold; together they describe the cache completely.

The format grows without a new version. A reader ignores members that it does not know, so a record may gain members
that explain; what a reader must know to decode correctly is named in the plan's ``features``, and a reader rejects
features that it does not know. Configuration files are another matter: there an unknown key is a typing error.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import PurePath
from typing import Annotated, Any, Literal, TypeVar, get_args

from annotated_types import Ge, Le
from pydantic import AfterValidator, BeforeValidator, ConfigDict, FailFast, Field, model_validator

from kdcache.config import Config
from kdcache.errors import shortened
from kdcache.schema.names import Name, ObjectPath, check_not_reserved, first_repeated

FORMAT_VERSION = 2

#: Features that this version can read; a cache that names another one needs a newer kdcache.
KNOWN_FEATURES: frozenset[str] = frozenset()

#: Columns that a writer adds to the per-sequence table; metadata of the corpus may not take their names.
STATISTICS_COLUMNS = ("num_targets", "teacher_loss", "teacher_entropy", "kept_mass")

#: Deepest nesting of the members that explain, such as provenance.
MAX_DEPTH = 32

#: A number of things: from 0 to what a float64 and JSON readers of other languages hold exactly.
Count = Annotated[int, Ge(0), Le(2**53)]


def _check_depth(values: dict[str, Any]) -> dict[str, Any]:
    level: list[Any] = [values]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return values
    raise ValueError(f"is nested more than {MAX_DEPTH} levels deep")


#: Members of any name and value, nested within bounds.
JsonObject = Annotated[dict[str, Any], AfterValidator(_check_depth)]


T = TypeVar("T")

#: Any number of members. Reading ends at the first that is wrong: a list of millions of them would fill the memory.
Many = Annotated[tuple[T, ...], FailFast()]

#: Most members of an object whose names are free, such as the objects of a shard.
MAX_MEMBERS = 10_000


def _check_members(values: Any) -> Any:
    if isinstance(values, Mapping) and len(values) > MAX_MEMBERS:
        raise ValueError(f"has {len(values):,} members, at most {MAX_MEMBERS:,} are expected")
    return values


#: An object whose names are free, all of one kind.
Named = Annotated[dict[Name, T], BeforeValidator(_check_members)]


class Record(Config):
    """Base of every record: frozen; members that this version does not know are ignored."""

    model_config = ConfigDict(extra="ignore")


class WeightsIdentity(Record):
    """A teacher that ran here: ``sha256`` covers every parameter as it was loaded in ``dtype``."""

    kind: Literal["weights"] = "weights"
    sha256: str
    dtype: str
    num_parameters: Count


class EndpointIdentity(Record):
    """A teacher behind a server: what the server says about itself. Never a URL, never a key."""

    kind: Literal["endpoint"] = "endpoint"
    model: str
    server: str
    server_version: str | None = None
    sampling: JsonObject = Field(default_factory=dict)
    """Settings of the requests that change the answers."""


class ImportIdentity(Record):
    """Targets that were read from a file of another tool: its format and the hash of its content."""

    kind: Literal["import"] = "import"
    source_format: str
    sha256: str


Identity = Annotated[WeightsIdentity | EndpointIdentity | ImportIdentity, Field(discriminator="kind")]


class TeacherRecord(Record):
    """Which model the targets are from; ``identity`` says how that can be checked."""

    name: str
    identity: Identity
    vocab_size: Count
    """Rows of the teacher's LM head, padding included."""
    architecture: str | None = None
    """Class of the model; None where it is unknown, as for the next two."""
    num_layers: Count | None = None
    hidden_size: Count | None = None
    revision: str | None = None
    backend: str = "transformers"

    @property
    def weights_sha256(self) -> str | None:
        """Hash of the weights; None where the teacher did not run here."""
        return self.identity.sha256 if isinstance(self.identity, WeightsIdentity) else None

    @property
    def dtype(self) -> str | None:
        """Data type that the teacher ran in; None where that is unknown."""
        return self.identity.dtype if isinstance(self.identity, WeightsIdentity) else None

    @property
    def num_parameters(self) -> int | None:
        """Number of parameters; None where that is unknown."""
        return self.identity.num_parameters if isinstance(self.identity, WeightsIdentity) else None


class TokenizerRecord(Record):
    """Which tokenizer made the ids: ``sha256`` covers vocabulary, merges, normalisation and special tokens."""

    sha256: str
    vocab_size: Count
    """True vocabulary size; ids at or above it are padding rows of the teacher and never stored."""
    bos_id: Count | None
    eos_id: Count | None
    pad_id: Count | None


class CorpusRecord(Record):
    """Which documents were read; ``fingerprint`` covers the id and the text of every one, in order."""

    sources: Many[str]
    text_field: str
    fingerprint: str
    num_documents: Count
    num_empty: Count
    num_too_short: Count
    metadata_columns: Many[str]
    licence: str | None = None
    num_truncated: Count = 0
    """Documents that were cut to fit into a sequence."""


Kind = Literal["top-k", "sampled", "hybrid", "hidden", "outputs"]
KINDS: tuple[Kind, ...] = get_args(Kind)

#: Numbers of a position that may be stored in addition to the kept ids.
Scalar = Literal["log_tail", "gold_logprob", "entropy"]
SCALARS: tuple[Scalar, ...] = get_args(Scalar)


class TargetsRecord(Record):
    """What is kept of the teacher's distribution at every position.

    ``top-k``: the most probable ids with their log-probabilities and the exact mass of all others. ``sampled``: counts
    of samples from the whole distribution, an unbiased estimate of it. ``hybrid``: the most probable ids exactly, and
    samples from the others. ``hidden``: the last hidden state, from which the teacher's LM head (once per cache) makes
    the whole distribution again. ``outputs``: no distribution at all; the teacher's numbers (scores, an embedding) are
    in the field of that name.
    """

    kind: Kind = "top-k"
    top_k: Count = 64
    """Most ids kept at a position, K."""
    min_prob: float = Field(default=0.0, ge=0, lt=1)
    """Ids of a smaller probability are not kept (the most probable one always is)."""
    min_mass: float = Field(default=1.0, gt=0, le=1)
    """The smallest set of most probable ids that has this mass is kept."""
    num_samples: Count = 0
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Of the samples."""
    temperatures: Many[float] = ()
    """Temperatures other than 1 at which the mass outside the kept ids is stored."""
    tail_prior: bool = False
    """Whether the mean probability of every id while it is not kept is stored, once for the cache."""
    scalars: Many[Scalar] = SCALARS
    """Which numbers of a position are stored; by default all that the kind has."""
    tail: Literal["exact", "remainder"] = "exact"
    """``exact``: the tail is the mass of all other ids. ``remainder``: it is one minus the kept mass."""
    probabilities: Literal["vocabulary", "kept"] = "vocabulary"
    """Over which ids the probabilities add up to 1: all of the vocabulary, or the kept ones (then without a tail)."""

    @model_validator(mode="before")
    @classmethod
    def _scalars_of_its_kind(cls, data: Any) -> Any:
        if not isinstance(data, Mapping) or "scalars" in data:
            return data
        kind, top_k = data.get("kind", "top-k"), data.get("top_k", cls.model_fields["top_k"].default)
        if kind == "outputs":
            return {**data, "scalars": ()}
        has_tail = bool(top_k) and data.get("probabilities", "vocabulary") == "vocabulary"
        return {**data, "scalars": tuple(name for name in SCALARS if name != "log_tail" or has_tail)}

    @property
    def is_ragged(self) -> bool:
        """Whether positions keep different numbers of ids."""
        return self.min_prob > 0 or self.min_mass < 1


class OutputsRecord(Record):
    """What the teacher's raw outputs at a row are: logits of classes, a score, or an embedding."""

    width: Count
    """Numbers at every row."""
    labels: Many[str] = ()
    """Names of the classes, in order; none where the outputs are no logits of classes."""
    pooling: str | None = None
    """How states of tokens become one embedding: mean, cls or last; None where the outputs are no embeddings."""
    normalised: bool | None = None
    """Of embeddings: whether their length is 1."""
    pair_types: bool = True
    """Whether tokens of a second text are fed as such (``token_type_ids`` 1), as the teacher's tokenizer has it."""


class ArrayRecord(Record):
    """One array of a shard: ``rows`` says what its first axis counts, ``shape`` what follows it.

    Rows are ``sequences``, ``tokens``, ``positions``, another axis that the shard's record counts, or ``table`` (as
    many as the array itself has).

    Rows of ``entries`` are the kept ids of all positions of a ragged cache, rows of ``samples`` the distinct sampled
    ids of all positions. Both are stored column by column: the first ones of all positions, then the second ones.
    """

    name: Name
    dtype: str
    rows: Name
    shape: Many[Count] = ()

    @property
    def path(self) -> str:
        """Name of the array inside its object, such as ``positions/topk_gaps``."""
        return f"{self.rows}/{self.name}"


def public_name(path: str) -> str:
    """Return ``path`` as records that are shared may name it: of an absolute path only the last part."""
    return PurePath(path).name if os.path.isabs(os.path.expanduser(path)) else path


_LAYER = "hidden-"
#: Name of the field of the teacher's raw outputs.
OUTPUTS_FIELD = "outputs"


def layer_field(layer: int) -> str:
    """Return the name of the field of a layer's hidden states."""
    return f"{_LAYER}{layer}"


class FieldRecord(Record):
    """A group of arrays that is stored and read together, one object per shard; ``codec`` with all its parameters."""

    name: Name
    kind: str
    """What the field is: ``tokens``, ``targets``, ``vectors``, or the kind of a plugin."""
    codec: JsonObject
    arrays: Many[ArrayRecord]
    relative_error: float | None = None
    """Of hidden states: root mean square of |decoded - state| / |state| over the rows of a pilot."""


class ObjectRecord(Record):
    """One immutable file of a shard; ``path`` is relative to the cache."""

    path: ObjectPath
    num_bytes: Count
    sha256: str


class Statistics(Record):
    """Sums over the positions that count (loss mask 1), so that shards add up exactly."""

    num_positions: Count = 0
    num_unlabelled: Count = 0
    """Positions for which the corpus has no answer, so that they have no loss."""
    teacher_loss_sum: float = 0.0
    entropy_sum: float = 0.0
    kept_mass_sum: float = 0.0
    top1_correct: Count = 0

    def __add__(self, other: Statistics) -> Statistics:
        mine, theirs = self.model_dump(), other.model_dump()
        return Statistics(**{name: mine[name] + theirs[name] for name in mine})


class ShardRecord(Record):
    """The commit record of a shard, written after all of its objects: its presence makes the shard exist."""

    index: Count
    attempt: Name
    num_rows: Named[Count]
    """By axis: ``sequences``, ``tokens``, ``positions``, and every other axis of the shard's arrays."""
    objects: Named[ObjectRecord]
    """By field name; ``sequences`` is the per-sequence Arrow table."""
    statistics: Statistics

    @property
    def num_sequences(self) -> int:
        """Number of sequences."""
        return self.num_rows["sequences"]

    @property
    def num_tokens(self) -> int:
        """Number of tokens."""
        return self.num_rows["tokens"]

    @property
    def num_positions(self) -> int:
        """Number of positions."""
        return self.num_rows["positions"]

    @model_validator(mode="after")
    def _has_what_every_shard_has(self) -> ShardRecord:
        missing = [axis for axis in ("sequences", "tokens", "positions") if axis not in self.num_rows]
        if missing:
            raise ValueError(f"num_rows does not count {missing[0]}")
        for record in self.objects.values():
            check_not_reserved(record.path)
        return self

    @property
    def num_bytes(self) -> int:
        """Bytes of all objects."""
        return sum(item.num_bytes for item in self.objects.values())


class Plan(Record):
    """Everything that is fixed before the teacher runs; two dumps with equal plans write the same content."""

    format_version: int = FORMAT_VERSION
    features: Many[str] = ()
    """Names of what a reader must know to decode this cache, beyond the format's version."""
    task: str
    teacher: TeacherRecord
    tokenizer: TokenizerRecord
    corpus: CorpusRecord
    targets: TargetsRecord
    sequences: JsonObject
    """How documents became sequences (max_length, packing, ...)."""
    fields: Many[FieldRecord]
    outputs: OutputsRecord | None = None
    """What the field of raw outputs holds; None for a cache without one."""
    num_sequences: Count
    num_positions: Count
    num_tokens: Count
    num_shards: Count
    shard_positions: Count
    """Positions after which a shard is closed, from which everyone derives the same shards."""
    table_sha256: str
    """Hash of plan.parquet."""
    provenance: JsonObject
    """Versions, command and time of creation: for people, never compared."""

    def field(self, name: str) -> FieldRecord:
        """Return the field called ``name`` (KeyError if the cache has none)."""
        for item in self.fields:
            if item.name == name:
                return item
        raise KeyError(name)

    @property
    def is_packed(self) -> bool:
        """Whether sequences hold several documents that do not see each other."""
        has_segments = any(array.name == "segment_ids" for array in self.field("tokens").arrays)
        return has_segments and self.sequences.get("packing") == "window"

    @property
    def num_ids(self) -> int:
        """Number of ids that the targets range over: classes where the outputs are their logits, else tokens."""
        if self.outputs is not None and self.outputs.labels:
            return len(self.outputs.labels)
        return self.tokenizer.vocab_size

    @property
    def states_field(self) -> str:
        """Name of the field of the last hidden state, whether or not it is stored."""
        return layer_field(self.teacher.num_layers or 0)

    @property
    def top_k(self) -> int:
        """Most ids kept at a position, K."""
        return self.targets.top_k

    @property
    def hidden_layers(self) -> tuple[str, ...]:
        """Names of the stored hidden-state fields, such as ``hidden-30``."""
        return tuple(name for name in self.vector_fields if name.startswith(_LAYER))

    @property
    def vector_fields(self) -> tuple[str, ...]:
        """Names of all fields of vectors: hidden states, raw outputs, and others."""
        return tuple(item.name for item in self.fields if item.kind == "vectors")

    @property
    def layer_widths(self) -> dict[int, int]:
        """Width of the stored hidden states by layer number: 0 is the embeddings, n the state after block n."""
        names = {name.removeprefix(_LAYER): name for name in self.hidden_layers}
        widths = {
            int(n): [a.shape[0] for a in self.field(name).arrays if a.shape] for n, name in names.items() if n.isdigit()
        }
        return {layer: found[0] for layer, found in sorted(widths.items()) if found}


class Manifest(Plan):
    """A finished cache: its plan and the commit record of every shard."""

    shards: Many[ShardRecord]
    tokenizer_files: Many[ObjectRecord] = ()
    cache_files: Many[ObjectRecord] = ()
    """What exists once for the whole cache: the teacher's LM head, the tail prior."""

    @model_validator(mode="after")
    def _each_file_once(self) -> Manifest:
        others = [*self.cache_files, *(record for shard in self.shards for record in shard.objects.values())]
        twice = first_repeated(record.path for record in (*self.tokenizer_files, *others))
        if twice is not None:
            raise ValueError(f"two files have the path {shortened(twice)!r}")
        for record in self.cache_files:
            check_not_reserved(record.path)
        for record in others:
            if record.path.lower().startswith("tokenizer/"):  # loaders would find it beside the tokenizer
                raise ValueError(f"the file {shortened(record.path)!r} lies in tokenizer/, but is none of a tokenizer")
        for record in self.tokenizer_files:
            check_not_reserved(record.path)
            if record.path.count("/") != 1 or not record.path.startswith("tokenizer/"):
                raise ValueError(f"the tokenizer file {shortened(record.path)!r} does not lie in tokenizer/")
        return self

    @property
    def plan(self) -> Plan:
        """The plan, which the manifest repeats."""
        return Plan(**self.model_dump(include=set(Plan.model_fields)))

    @property
    def num_bytes(self) -> int:
        """Bytes of all shards."""
        return sum(shard.num_bytes for shard in self.shards)

    @property
    def bytes_per_token(self) -> float:
        """Bytes on disk per predicted position."""
        return self.num_bytes / max(self.num_positions, 1)

    @property
    def statistics(self) -> Statistics:
        """Sums over all shards."""
        return sum((shard.statistics for shard in self.shards), Statistics())
