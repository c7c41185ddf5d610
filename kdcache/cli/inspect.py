"""``kdcache inspect``."""

from __future__ import annotations

from typing import Any

import click

from kdcache import terminal
from kdcache.cli import options
from kdcache.schema import Manifest, OutputsRecord, TargetsRecord, TeacherRecord
from kdcache.words import count


@click.command("inspect", context_settings=options.CONTEXT)
@click.argument("cache")
@options.json_option
def command(cache: str, as_json: bool) -> None:
    """Show the contents of CACHE: teacher, tokenizer, corpus, fields, sizes and statistics.

    Reads only the manifest and the sizes of files; needs neither torch nor the teacher.
    """
    from kdcache.cache import open_cache
    from kdcache.inspect import inspect_cache

    opened = open_cache(cache)
    description = inspect_cache(opened)
    if as_json:
        terminal.echo_json(description)
        return
    manifest, totals = opened.manifest, description["totals"]
    teacher, corpus, unit = manifest.teacher, manifest.corpus, _unit(manifest.task)
    rows: list[tuple[str, Any]] = [
        ("cache", f"{cache} (format {manifest.format_version}, {manifest.task})"),
        ("fingerprint", opened.fingerprint),
        ("teacher", _teacher(teacher)),
        ("identity", _identity(teacher)),
        ("tokenizer", f"{count(opened.vocab_size, 'id')}, sha256 {manifest.tokenizer.sha256[:16]}..."),
        ("corpus", f"{', '.join(corpus.sources)}: {_documents(manifest)}, licence {corpus.licence or 'not given'}"),
        ("sequences", f"{manifest.num_sequences:,} ({_settings(manifest.sequences)})"),
        ("targets", _targets(manifest.targets)),
        *([] if manifest.outputs is None else [("outputs", _outputs(manifest.outputs))]),
        ("positions", f"{manifest.num_positions:,} ({_counted(manifest, totals)})"),
        ("size", _size(manifest, totals)),
        (f"bytes/{unit}", f"{totals['bytes_per_token']:.2f}"),
    ]
    for item in manifest.fields:
        size = sum(shard.objects[item.name].num_bytes for shard in manifest.shards) / max(manifest.num_positions, 1)
        error = "" if item.relative_error is None else f", relative error {item.relative_error:.1e}"
        holds = f"{_settings(item.codec)}{error}" if item.codec else "tokens, lengths, loss mask"
        rows.append((f"  {item.name}", f"{size:.2f} bytes/{unit} ({holds})"))
    rows += [
        *_statistics(manifest, totals),
        ("created", _created(manifest.provenance)),
    ]
    rows += [("transcoded", text) for text in _transcoded(manifest.provenance)]
    if corpus.metadata_columns:
        rows.insert(6, ("metadata", ", ".join(corpus.metadata_columns)))
    terminal.echo_rows(rows)


def _unit(task: str) -> str:
    """Return the unit of a position: token or row."""
    from kdcache.tasks import TASKS

    # A cache of an unknown task can be inspected too.
    return TASKS[task].unit if task in TASKS else "row"


def _size(manifest: Manifest, totals: dict[str, Any]) -> str:
    """Return the size of the whole folder, and of its parts."""
    from kdcache.cache import layout

    parts = dict(totals["bytes_by_part"])
    names = {layout.LM_HEAD: "LM head", layout.TAIL_PRIOR: "tail prior"}
    shards = f"{options.human_bytes(parts.pop('shards'))} in {count(manifest.num_shards, 'shard')}"
    others = [f"{names.get(name, name)} {options.human_bytes(size)}" for name, size in parts.items() if size]
    return f"{options.human_bytes(totals['folder_bytes'])}: {', '.join([shards, *others])}"


def _documents(manifest: Manifest) -> str:
    """Return the number of documents, and how many were empty, too short or truncated."""
    from kdcache.tasks.causal_lm import CausalLM

    corpus = manifest.corpus
    if manifest.task == CausalLM.name:
        left = f"{corpus.num_empty:,} empty, {corpus.num_too_short:,} of one token"
    else:
        left = f"{corpus.num_empty:,} empty, {corpus.num_too_short:,} too short, {corpus.num_truncated:,} cut to fit"
    return f"{count(corpus.num_documents, 'document')} ({left})"


def _counted(manifest: Manifest, totals: dict[str, Any]) -> str:
    num_unlabelled = totals["num_targets"] - totals["num_labelled"]
    # Without a distribution the teacher has no loss, and labels are not counted.
    is_known = manifest.targets.kind != "outputs" and num_unlabelled
    return f"{totals['num_targets']:,} count in the loss" + (
        f", {num_unlabelled:,} without a label" if is_known else ""
    )


def _statistics(manifest: Manifest, totals: dict[str, Any]) -> list[tuple[str, Any]]:
    """Return the statistics of the teacher's distributions; none for raw outputs."""
    if manifest.targets.kind == "outputs":
        return []
    loss = totals["teacher_loss"]
    perplexity = "" if loss is None else f" nats (perplexity {totals['teacher_perplexity']:.2f})"
    return [
        *options.known_row("teacher loss", loss, ".4f", perplexity),
        *([] if loss is None else [("top-1 accuracy", _known(totals["teacher_top1_accuracy"]))]),
        *options.known_row("entropy", totals["teacher_entropy"], ".4f", " nats"),
        *options.known_row("kept mass", totals["kept_mass"], ".4f"),
    ]


def _outputs(record: OutputsRecord) -> str:
    """Say what the raw outputs at a row are."""
    parts = [f"{record.width} at every row"]
    if record.labels:
        shown = ", ".join(record.labels[:8]) + (", ..." if len(record.labels) > 8 else "")
        parts.append(f"logits of {shown}")
    if record.pooling is not None:
        parts.append(f"{record.pooling} pooling, {'normalised' if record.normalised else 'not normalised'}")
    return "; ".join(parts)


def _targets(record: TargetsRecord) -> str:
    """Return what is stored per position."""
    if record.kind == "outputs":
        return "outputs: numbers, no distribution"
    parts = [f"{record.kind}: " + (f"top {record.top_k}" if record.top_k else "no ids exactly")]
    parts += [f"with p >= {record.min_prob:g}"] if record.min_prob else []
    parts += [f"of mass {record.min_mass:g}"] if record.min_mass < 1 else []
    parts += [f"{record.num_samples} samples (seed {record.seed})"] if record.num_samples else []
    parts += [f"tails at T = {', '.join(f'{t:g}' for t in record.temperatures)}"] if record.temperatures else []
    parts += ["tail prior"] if record.tail_prior else []
    parts += ["tail = 1 - kept mass"] if record.tail == "remainder" else []
    parts += ["probabilities renormalised over the kept ids"] if record.probabilities == "kept" else []
    missing = [name for name in ("gold_logprob", "entropy") if name not in record.scalars]
    parts += [f"without {' and '.join(missing)}"] if missing else []
    return ", ".join(parts)


def _created(provenance: dict[str, Any]) -> str:
    # Provenance is free text for people; any member may be missing.
    versions = provenance.get("versions")
    version = versions.get("kdcache") if isinstance(versions, dict) else None
    return f"{provenance.get('created', 'unknown')} by kdcache {version or 'of an unknown version'}"


def _known(value: float | None) -> str:
    return "unknown: samples do not determine the top-1 id" if value is None else f"{value:.4f}"


def _transcoded(provenance: dict[str, Any]) -> list[str]:
    """Return the caches that this one was made from, oldest first."""
    links = provenance.get("transcoded")
    known = [link for link in links if isinstance(link, dict)] if isinstance(links, list) else []
    return [f"from {str(link.get('source'))[:16]}..., {link.get('created', 'unknown')}" for link in known]


def _settings(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())


def _teacher(teacher: TeacherRecord) -> str:
    size = None if teacher.num_parameters is None else f"{teacher.num_parameters / 1e6:,.1f} M parameters"
    known = [fact for fact in (teacher.architecture, size, teacher.dtype) if fact is not None]
    return f"{teacher.name}: {', '.join(known or [teacher.backend])}"


def _identity(teacher: TeacherRecord) -> str:
    identity = teacher.identity
    if identity.kind == "endpoint":
        return f"{identity.model} served by {identity.server} {identity.server_version or ''}".rstrip()
    read = "" if identity.kind == "weights" else f", read from {identity.source_format}"
    return f"sha256 {identity.sha256[:16]}...{read}"
