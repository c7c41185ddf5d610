"""Turn documents of a corpus into lines with the teacher's texts."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from kdcache.corpus import Corpus, Role, load_corpus
from kdcache.errors import ConfigError, CorpusError, TeacherError
from kdcache.models.generation import WrittenText, generation_settings, write_all
from kdcache.models.loading import load_config, load_tokenizer, parse_dtype, pick_device
from kdcache.models.tokenizer import TextEncoder, tokenizer_record
from kdcache.schema import public_name
from kdcache.tasks.seq2seq_lm import Seq2SeqLM, fed_inputs
from kdcache.teachers import HuggingFaceTeacher, load_teacher
from kdcache.teachers.sampling import Sampler
from kdcache.write.config import WriteConfig
from kdcache.write.output import lock_path, settings_path

ROLES = (Role("input"), Role("target", is_required=False))
#: Columns that the file adds to those of the corpus.
_OWN = ("input", "target", "reference")

Rows = list[tuple[str, dict[str, Any]]]


@dataclass
class WriteCounts:
    """Counts of what was written: texts and tokens, empty and cut ones."""

    num_written: int = 0
    num_tokens: int = 0
    num_empty: int = 0
    """Documents without input, whose target is null."""
    num_cut_inputs: int = 0
    num_cut_targets: int = 0
    """Texts that reached the greatest length before their end."""


class Writer:
    """Everything that a configuration loads, cheapest first: most mistakes show before the teacher is loaded."""

    def __init__(self, config: WriteConfig) -> None:
        self.config = config
        _check_local(config.output)
        pick_device(config.teacher.device)
        if config.teacher.dtype != "auto":
            parse_dtype(config.teacher.dtype)
        output = Path(config.output)
        self.corpus = load_corpus(config.corpus, ROLES, outputs=[output, settings_path(output), lock_path(output)])
        _check_columns(self.corpus)
        name, revision = config.teacher.model, config.teacher.revision
        _check_encoder_decoder(config)
        self.tokenizer = load_tokenizer(name, revision=revision, error=TeacherError)
        self.encoder = TextEncoder(self.tokenizer)
        self.tokenizer_record = tokenizer_record(self.tokenizer)
        fed_inputs(self.encoder, config.sequences, [])  # lengths without room show here

    @cached_property
    def teacher(self) -> HuggingFaceTeacher:
        """The teacher, loaded on first use."""
        teacher = load_teacher(self.config.teacher, self.tokenizer_record.vocab_size, Seq2SeqLM())
        _check_lengths(self.config, teacher)
        return teacher

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The settings that decide the texts and the teacher that wrote them; they are stored with the file."""
        config, teacher = self.config, self.teacher.record.model_dump(mode="json")
        writing: dict[str, Any] = {"beams": config.writing.num_beams}
        if config.writing.sample:
            writing = {"sample": True, **config.writing.sampling._asdict()}
        return {
            "teacher": {**teacher, "name": public_name(teacher["name"])},
            "tokenizer": self.tokenizer_record.sha256,
            "corpus": {
                "sources": [public_name(source) for source in self.corpus.sources],
                "fingerprint": self.corpus.fingerprint,
                "num_documents": len(self.corpus),
                "metadata_columns": list(self.corpus.metadata_columns),
            },
            "sequences": config.sequences.model_dump(mode="json"),
            "writing": writing,
            "generation": generation_settings(self.teacher.model),
            "batch_tokens": config.batch_tokens,
        }

    def lines(self, start: int, rows: Rows, counts: WriteCounts) -> list[dict[str, Any]]:
        """Return the lines of some documents; ``start`` is the number of the first one."""
        inputs, is_cut_N = fed_inputs(self.encoder, self.config.sequences, [text for text, _ in rows])
        filled = [n for n, tokens in enumerate(inputs) if len(tokens)]
        written = dict(zip(filled, self._write([inputs[n] for n in filled], [start + n for n in filled]), strict=True))
        counts.num_tokens += sum(text.num_tokens for text in written.values())
        counts.num_empty += len(rows) - len(filled)
        counts.num_cut_inputs += sum(is_cut_N)
        counts.num_cut_targets += sum(text.is_cut for text in written.values())
        others = self.corpus.metadata_table(range(start, start + len(rows))).to_pylist() or [{} for _ in rows]
        return [
            _line(row, written.get(n), other, "target" in self.corpus.more)
            for n, (row, other) in enumerate(zip(rows, others, strict=True))
        ]

    def _write(self, inputs: list[Any], documents: list[int]) -> list[WrittenText]:
        for document, tokens in zip(documents, inputs, strict=True):
            if tokens.max(initial=0) >= self.teacher.vocab_size:
                raise TeacherError(
                    f"document {document} has a token with the id {tokens.max()}, but {self.config.teacher.model} only "
                    f"has {self.teacher.vocab_size} ids; use the tokenizer that belongs to the model"
                )
        writing, max_tokens = self.config.writing, self.config.sequences.max_target_length
        sampling = writing.sampling

        def chooser_of(batch: list[int]) -> Sampler:
            numbers = [documents[n] for n in batch]
            return Sampler(sampling.seed, numbers, max_tokens, temperature=sampling.temperature, top_p=sampling.top_p)

        try:
            return write_all(
                self.teacher.model,
                self.tokenizer,
                self.teacher.vocab_size,
                inputs,
                max_tokens=max_tokens,
                batch_tokens=self.config.batch_tokens,
                beams=writing.num_beams,
                chooser_of=chooser_of if writing.sample else None,
                equal_lengths=self.teacher.sees_padding,
            )
        except (MemoryError, torch.OutOfMemoryError):
            raise TeacherError(
                f"a batch of {self.config.batch_tokens} tokens and {writing.num_beams} beams does not fit in the "
                "memory of the teacher's device; use a smaller --batch-tokens or fewer --beams"
            ) from None


def _line(
    row: tuple[str, dict[str, Any]], written: WrittenText | None, others: dict[str, Any], has_reference: bool
) -> dict[str, Any]:
    text, more = row
    line: dict[str, Any] = {"input": text, "target": None if written is None else written.text}
    return line | ({"reference": more["target"]} if has_reference else {}) | others


def _check_local(output: str) -> None:
    if "://" in output:
        raise ConfigError(f"output {output} is not local, and lines can be added to a local file only; give a path")
    if not output.endswith(".jsonl"):
        raise ConfigError(f"output {output}: JSON lines are written, so give a name that ends in .jsonl")


def _check_columns(corpus: Corpus) -> None:
    taken = [name for name in corpus.metadata_columns if name in _OWN]
    if taken:
        raise CorpusError(
            f"the corpus has a column {taken[0]!r} that is neither the input nor the target, and the file has one of "
            "its own by this name; rename it, or choose it with --column input=NAME or target=NAME"
        )


def _check_encoder_decoder(config: WriteConfig) -> None:
    name = config.teacher.model
    found = load_config(name, revision=config.teacher.revision, error=TeacherError)
    if not found.is_encoder_decoder:
        raise TeacherError(
            f"{name} is a {found.model_type}, which is no encoder-decoder; targets are written by models of task "
            f"{Seq2SeqLM.name} (T5, BART) alone"
        )


def _check_lengths(config: WriteConfig, teacher: HuggingFaceTeacher) -> None:
    limit = teacher.capabilities.context_length
    for name in ("max_length", "max_target_length"):
        length = getattr(config.sequences, name)
        if limit is not None and length > limit:
            raise ConfigError(f"{name} is {length}, but {config.teacher.model} was made for {limit}; use a smaller one")
