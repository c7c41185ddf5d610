"""The page and the plot of the benchmark ``fidelity``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_PAGE = """\
# Fidelity per byte

Written by `{command}`; do not edit it by hand.

| | |
|---|---|
| teacher | {teacher}, {teacher_dtype}, V = {vocab_size:,} |
| corpus | {corpus}, licence {licence}; {num_positions:,} positions measured |
| cache | hidden states as {states_codec}, fingerprint `{fingerprint}` |
| machine | {cpu}, one core; Python {python}, torch {torch}; {seconds:.0f} s for everything |

![Bytes per token against what is lost](fidelity.png)

Logits are made from the cache's hidden states ({states_codec}) and the LM head in float32. That is harder than what a
dump of a bfloat16 teacher sees, whose own logits are rounded to 8 bits: fewer values coincide, so ids have a strict
order that costs bytes. States that are stored as {states_codec} are the reference here, so a preset that stores them in
the same format loses nothing on this page (and has no place on the logarithmic axes).

## Bytes, losses and speed

{main_table}

- *bytes/token* of kdcache: whole objects as a dump writes them, token ids, masks and the per-sequence table included;
  what a shard has once is shared out to the positions of a shard. Of published layouts: their rows alone, without
  containers and token ids.
- *KL lost*: KL in nats from the exact to the decoded kept ids with the tail as one outcome. Published layouts store no
  tail; theirs is a ghost token of mass 1 - sum (at least {least_ghost:.1e}), and in brackets the kept ids alone, both
  sides renormalised.
- *full KL*: from the teacher to the decoded row completed to a distribution over the vocabulary, by a flat tail and by
  the tail prior, which was estimated on the other half of the positions. Renormalised rows give 0 to ids that the
  teacher gives mass to, so theirs is infinite; a row of samples likewise.
- *batch-mean error*: L2 norm of the mean over {batch:,} positions of target - teacher, with the best treatment of the
  tail. Unbiased targets lose it in larger batches, biased ones do not.
- *encode* and *decode*: tokens per second of one core's own time, compression and checksums included, the faster of
  two runs; decode ends at log-probabilities.

## Treatments of the tail

Batch-mean error by treatment; `within` is the mean of m KL(tail || flat tail), which the bucket loss does not see.

{tail_table}

## What the entropy bound leaves to compact

{compact_table}

The bound is the order-0 entropy of each column of the encoded arrays (Miller and Madow's correction for the many ids
that occur rarely): what an adaptive entropy coder without any context but the column could reach.
Reading in bulk: {unpack:,.0f} tokens/s unpack (decompression and checksums), which is all that remains when the
cumulative sum, the id table and the normalisation are left to the device; {decode:,.0f} tokens/s decode what is
unpacked; {both:,.0f} tokens/s do both, to final log-probabilities.

## Codecs of hidden states

Relative error (root mean square of |decoded - state| / |state|) by layer.

{layer_table}
"""


def _small(value: float | None) -> str:
    if value is None:
        return "-"
    if value == 0:
        return "0"
    return f"{value:.1e}" if abs(value) < 1e-3 else f"{value:.4f}"


def text_rows(layouts: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of the main table; losses as text, because they span many orders of magnitude."""
    return [_text_row(name, row) for name, row in layouts.items()]


def _text_row(name: str, row: dict[str, Any]) -> dict[str, Any]:
    lost, kept = _small(row["codec_kl"]), row.get("codec_kl_renormalised")
    errors = row["batch_mean_error"]
    best = min(errors, key=errors.__getitem__)
    full = row["full_kl"]
    return {
        "layout": name,
        "bytes/token": f"{row['bytes_per_token']:.1f}",
        "KL lost": lost if kept is None else f"{lost} ({_small(kept)})",
        "kept mass": "-" if row["kept_mass"] is None else f"{row['kept_mass']:.3f}",
        "full KL, flat": _small(full.get("uniform", full.get("full"))),
        "full KL, prior": _small(full.get("prior")),
        "batch-mean error": f"{_small(errors[best])} {best}",
        "encode tokens/s": row["encode_tokens_per_s"],
        "decode tokens/s": row["decode_tokens_per_s"],
    }


def write(directory: Path, result: dict[str, Any], machine: dict[str, Any]) -> None:
    """Write fidelity.md and fidelity.png into ``directory``."""
    from kdcache.estimate.rows import BATCH_POSITIONS

    directory.mkdir(parents=True, exist_ok=True)
    cache, compact = result["cache"], result["compact"]
    page = _PAGE.format(
        command="python -m benchmarks.fidelity CACHE --positions " + str(result["options"]["positions"]),
        **{**cache, "licence": cache["licence"] or "not given", "num_positions": result["num_positions"]},
        **{name: machine[name] for name in ("cpu", "python", "torch")},
        seconds=result["seconds"],
        main_table=_markdown([_with_whole_numbers(row) for row in text_rows(result["layouts"])]),
        least_ghost=result["least_ghost"],
        batch=min(BATCH_POSITIONS, result["num_positions"]),
        tail_table=_markdown(list(_tail_rows(result["layouts"]))),
        compact_table=_markdown(_compact_rows(compact)),
        unpack=compact["unpack_tokens_per_s"],
        decode=compact["decode_tokens_per_s"],
        both=compact["unpack_and_decode_tokens_per_s"],
        layer_table=_markdown(_layer_rows(result["layers"])),
    )
    (directory / "fidelity.md").write_text(page, encoding="utf-8")
    plot(directory / "fidelity.png", result["layouts"])


def _with_whole_numbers(row: dict[str, Any]) -> dict[str, str]:
    return {name: f"{value:,.0f}" if isinstance(value, float) else value for name, value in row.items()}


def _tail_rows(layouts: dict[str, dict[str, Any]]) -> list[dict[str, str]]:
    treatments = ("uniform", "prior", "renormalise", "drop", "samples", "full")
    return [
        {
            "layout": name,
            "within": _small(row["within_tail_kl"]),
            **{treatment: _small(row["batch_mean_error"].get(treatment)) for treatment in treatments},
        }
        for name, row in layouts.items()
    ]


def _compact_rows(compact: dict[str, float]) -> list[dict[str, str]]:
    parts = {"ids (frequency ranks)": "topk_ranks", "gaps": "topk_gaps"}
    rows = [
        {
            "part": title,
            "bytes/token on disk": f"{compact[f'{name}_bytes']:.1f}",
            "entropy bound": f"{compact[f'{name}_entropy_bytes']:.1f}",
            "left": f"{compact[f'{name}_bytes'] - compact[f'{name}_entropy_bytes']:.1f}",
        }
        for title, name in parts.items()
    ]
    size = f"{compact['id_table_bytes']:.1f}"
    return [*rows, {"part": "id table", "bytes/token on disk": size, "entropy bound": "-", "left": "-"}]


def _layer_rows(layers: dict[str, dict[str, float | None]]) -> list[dict[str, str]]:
    return [
        {"layer": name, **{codec: "refused" if e is None else _small(e) for codec, e in errors.items()}}
        for name, errors in layers.items()
    ]


def _markdown(rows: list[dict[str, str]]) -> str:
    columns = list(rows[0])
    lines = ["| " + " | ".join(columns) + " |", "|---" + "|---:" * (len(columns) - 1) + "|"]
    for row in rows:
        first, *rest = (row[column] for column in columns)
        lines.append("| " + " | ".join([f"`{first}`", *rest]) + " |")
    return "\n".join(lines)


def plot(path: Path, layouts: dict[str, dict[str, Any]]) -> None:
    """Draw bytes per token against the full-vocabulary KL and, beside it, against the batch-mean error."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    figure, panels = pyplot.subplots(1, 2, figsize=(13, 5.5), constrained_layout=True)
    titles = {"full_kl": "full-vocabulary KL, best tail (nats)", "batch_mean_error": "batch-mean error (L2)"}
    for panel, (key, title) in zip(panels, titles.items(), strict=True):
        _panel(panel, layouts, key)
        panel.set(xscale="log", yscale="log", xlabel="bytes per token", ylabel=title)
        panel.margins(x=0.22, y=0.12)
        panel.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        panel.xaxis.set_major_formatter(ticker.ScalarFormatter())
        panel.xaxis.set_minor_formatter(ticker.NullFormatter())
        panel.grid(alpha=0.3, which="both")
    panels[0].legend(loc="lower left")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _panel(panel: Any, layouts: dict[str, dict[str, Any]], key: str) -> None:
    for is_preset, colour, label in ((True, "tab:blue", "kdcache presets"), (False, "tab:orange", "published layouts")):
        points = sorted(_points(layouts, key, is_preset))
        panel.scatter([x for x, _, _ in points], [y for _, y, _ in points], color=colour, label=label)
        for number, (x, y, name) in enumerate(points):
            # In turns above and below, the two colours on opposite sides: neighbours would cover each other.
            place = (0, 7 if (number % 2 == 0) is is_preset else -14)
            panel.annotate(
                name, (x, y), textcoords="offset points", xytext=place, fontsize=8, color=colour, ha="center"
            )


def _points(layouts: dict[str, dict[str, Any]], key: str, is_preset: bool) -> list[tuple[float, float, str]]:
    """Return bytes, the smallest number of ``key`` and the name of every layout that a logarithmic axis can show."""
    best = {name: min(row[key].values(), default=0.0) for name, row in layouts.items() if row["is_preset"] is is_preset}
    return [(layouts[name]["bytes_per_token"], y, name) for name, y in best.items() if 0 < y < float("inf")]
