"""``kdcache inspect``."""

from __future__ import annotations

from typing import Any

import click

from kdcache.cli import options
from kdcache.schema import TargetsRecord


@click.command("inspect", context_settings=options.CONTEXT)
@click.argument("cache")
@options.json_option
def command(cache: str, as_json: bool) -> None:
    """Show what CACHE holds: teacher, tokenizer, corpus, fields, sizes and statistics.

    Reads the manifest alone; needs neither torch nor the teacher.
    """
    from kdcache.cache import describe, open_cache

    opened = open_cache(cache)
    description = describe(opened)
    if as_json:
        options.echo_json(description)
        return
    manifest, totals = opened.manifest, description["totals"]
    teacher, corpus = manifest.teacher, manifest.corpus
    rows: list[tuple[str, Any]] = [
        ("cache", f"{cache} (format {manifest.format_version}, {manifest.task})"),
        ("fingerprint", opened.fingerprint),
        (
            "teacher",
            f"{teacher.name}: {teacher.architecture}, {teacher.num_parameters / 1e6:,.1f} M parameters, "
            f"{teacher.dtype}",
        ),
        ("weights", f"sha256 {teacher.weights_sha256[:16]}..."),
        ("tokenizer", f"{opened.vocab_size:,} ids, sha256 {manifest.tokenizer.sha256[:16]}..."),
        (
            "corpus",
            f"{', '.join(corpus.sources)}: {corpus.num_documents:,} documents "
            f"({corpus.num_empty:,} empty, {corpus.num_too_short:,} of one token), "
            f"licence {corpus.licence or 'not given'}",
        ),
        ("sequences", f"{manifest.num_sequences:,} ({_settings(manifest.sequences)})"),
        ("targets", _targets(manifest.targets)),
        ("positions", f"{manifest.num_positions:,} ({totals['num_targets']:,} count in the loss)"),
        ("size", f"{options.human_bytes(totals['num_bytes'])} in {manifest.num_shards} shards"),
        ("bytes/token", f"{totals['bytes_per_token']:.2f}"),
    ]
    for item in manifest.fields:
        size = sum(shard.objects[item.name].num_bytes for shard in manifest.shards) / max(manifest.num_positions, 1)
        error = "" if item.relative_error is None else f", relative error {item.relative_error:.1e}"
        rows.append((f"  {item.name}", f"{size:.2f} bytes/token ({_settings(item.codec)}{error})"))
    rows += [(f"  {item.path}", f"{options.human_bytes(item.num_bytes)}, once") for item in manifest.cache_files]
    rows += [
        ("teacher loss", f"{totals['teacher_loss']:.4f} nats (perplexity {totals['teacher_perplexity']:.2f})"),
        ("top-1 accuracy", _known(totals["teacher_top1_accuracy"])),
        ("entropy", f"{totals['teacher_entropy']:.4f} nats"),
        ("kept mass", f"{totals['kept_mass']:.4f}"),
        ("created", _created(manifest.provenance)),
    ]
    rows += [("transcoded", text) for text in _transcoded(manifest.provenance)]
    if corpus.metadata_columns:
        rows.insert(6, ("metadata", ", ".join(corpus.metadata_columns)))
    options.echo_rows(rows)


def _targets(record: TargetsRecord) -> str:
    """Say what is kept at every position."""
    parts = [f"{record.kind}: " + (f"top {record.top_k}" if record.top_k else "no ids exactly")]
    parts += [f"with p >= {record.min_prob:g}"] if record.min_prob else []
    parts += [f"of mass {record.min_mass:g}"] if record.min_mass < 1 else []
    parts += [f"{record.num_draws} draws (seed {record.seed})"] if record.num_draws else []
    parts += [f"tails at T = {', '.join(f'{t:g}' for t in record.temperatures)}"] if record.temperatures else []
    parts += ["tail prior"] if record.tail_prior else []
    return ", ".join(parts)


def _created(provenance: dict[str, Any]) -> str:
    # For people only, so a manifest may say anything here, or nothing.
    versions = provenance.get("versions")
    version = versions.get("kdcache") if isinstance(versions, dict) else None
    return f"{provenance.get('created', 'unknown')} by kdcache {version or 'of an unknown version'}"


def _known(value: float | None) -> str:
    return "unknown: draws only suggest the favourite" if value is None else f"{value:.4f}"


def _transcoded(provenance: dict[str, Any]) -> list[str]:
    """Say which caches this one was made from, the oldest first."""
    links = provenance.get("transcoded")
    known = [link for link in links if isinstance(link, dict)] if isinstance(links, list) else []
    return [f"from {str(link.get('source'))[:16]}..., {link.get('created', 'unknown')}" for link in known]


def _settings(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())
