"""Measure bytes per token, and what they lose of the teacher, for all presets and for published layouts.

The cache must be of the kind hidden (``kdcache dump-teacher --targets hidden``): its hidden states and its LM head give
the teacher's logits, in float32, chunk by chunk. The codecs of kdcache encode, write and read all presets; the layouts
of `benchmarks.peers` encode the same positions. Prints a table, and writes a page and a plot.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
import time
from functools import partial
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch

from benchmarks import fidelity_page, report
from benchmarks.peers import PEERS, PeerRows, SampledPeer, TeacherSample, TopLogprobs
from kdcache.cache import Cache, open_cache
from kdcache.cache.shard_file import pack, unpack
from kdcache.codecs import VECTOR_CODECS, targets_codec, vector_codec
from kdcache.codecs.vectors import relative_error
from kdcache.config import build, merge
from kdcache.dump import DumpConfig
from kdcache.errors import CacheError, ConfigError, KdcacheError, TeacherError
from kdcache.estimate import HeadLogits, Measured, Sample, measure, plan_of
from kdcache.estimate.measure import compare
from kdcache.estimate.rows import Rows, Spread, batch_mean_error
from kdcache.estimate.storage import best_of_two
from kdcache.json_files import finite
from kdcache.models.lm_head import head_from_bytes
from kdcache.presets import PRESETS
from kdcache.progress import bar, reporter
from kdcache.schema import STATISTICS_COLUMNS, Plan, Samples, Sequence, Targets, TargetsRecord

#: The largest k of a published layout.
_PEER_TOP_K = 128
#: Mass of a ghost token where the stored probabilities sum to 1 or more: the resolution of float32.
_LEAST_GHOST = float(np.finfo(np.float32).eps)
_LAYER_POSITIONS = 4096


def main() -> None:
    parser = report.arguments(__doc__.splitlines()[0])
    parser.add_argument("cache", help="a finished cache of the kind hidden")
    parser.add_argument("--positions", type=int, default=50_000, help="positions of the cache that are measured")
    parser.add_argument("--output", default="docs", help="directory of fidelity.md and fidelity.png")
    options = parser.parse_args()
    if importlib.util.find_spec("matplotlib") is None:
        parser.error("the plot needs matplotlib: pip install 'kdcache[report]'")
    torch.set_num_threads(1)
    try:
        run(options)
    except KdcacheError as error:
        sys.exit(f"Error: {error}")


def run(options: Any) -> None:
    began = time.perf_counter()
    cache = open_cache(options.cache)
    sample = load_sample(cache, options.positions)
    plans = {name: preset_plan(name, cache, sample) for name in PRESETS}
    for_peers = TargetsRecord(top_k=min(_PEER_TOP_K, sample.vocab_size))
    with bar(2 * sample.num_positions, "measure", "tok") as meter:
        step = reporter(meter)
        total = 2 * sample.num_positions
        measured = measure(sample, plans, also=(for_peers,), report=lambda done: step(done, total))
    top, samples = measured.kept[for_peers].targets, measured.kept[plans["sampled"].targets].targets.samples
    assert samples is not None
    presets = {name: preset_row(name, measured) for name in PRESETS}
    layouts = presets | peer_rows(sample, top, samples, measured)
    result = {
        "options": {"positions": options.positions},
        "num_positions": sample.num_positions,
        "cache": describe(cache),
        "layouts": layouts,
        "compact": compact_bound(plans["compact"], measured),
        "layers": layer_errors(cache),
        "least_ghost": _LEAST_GHOST,
        "seconds": time.perf_counter() - began,
    }
    title = f"fidelity: {result['cache']['teacher']}, {sample.num_positions:,} positions, V = {sample.vocab_size:,}"
    report.show(title, fidelity_page.text_rows(layouts), finite(result), options.json)
    fidelity_page.write(Path(options.output), result, report.machine())


def load_sample(cache: Cache, num_positions: int) -> Sample:
    """Return the first sequences of ``cache`` that have ``num_positions``, with float32 logits."""
    if cache.manifest.targets.kind != "hidden":
        raise CacheError(
            f"{cache.folder} holds targets of the kind {cache.manifest.targets.kind}; real logits need a cache made "
            "with kdcache dump-teacher --targets hidden"
        )
    if num_positions < 1:
        raise ConfigError(f"at least one position has to be measured, found {num_positions}")
    head = head_from_bytes(cache.lm_head_file())
    bias_V = None if head.bias_V is None else head.bias_V.float()
    head = dataclasses.replace(head, weight_VD=head.weight_VD.float(), bias_V=bias_V)
    count = min(int(np.searchsorted(np.cumsum(cache.lengths_N), num_positions)) + 1, len(cache))
    sequences, states = [], []
    for index in range(count):
        batch = cache.read([index])
        sequences.append(Sequence(index, batch.tokens_T, batch.loss_mask_P, batch.segment_ids_T))
        states.append(batch.hidden["last"])
    table = cache.sequence_table().slice(0, count).combine_chunks()
    table = table.drop_columns([name for name in STATISTICS_COLUMNS if name in table.column_names])
    return Sample(sequences, table, cache.vocab_size, HeadLogits(np.concatenate(states), head))


def preset_plan(name: str, cache: Cache, sample: Sample) -> Plan:
    manifest = cache.manifest
    place = {"output": "none", "teacher": {"model": manifest.teacher.name}, "corpus": {"paths": ["none"]}}
    config = build(DumpConfig, merge({**place, "sequences": manifest.sequences}, PRESETS[name].settings))
    assert isinstance(sample.logits, HeadLogits)
    return plan_of(config, manifest, sample.logits.states_PD)


def describe(cache: Cache) -> dict[str, Any]:
    manifest = cache.manifest
    states, teacher = manifest.field(manifest.states_field), manifest.teacher.name
    return {
        "teacher": teacher if teacher.count("/") < 2 else PurePath(teacher).name,  # a path means nothing elsewhere
        "teacher_dtype": manifest.teacher.dtype,
        "corpus": ", ".join(manifest.corpus.sources),
        "licence": manifest.corpus.licence,
        "num_positions": manifest.num_positions,
        "vocab_size": cache.vocab_size,
        "states_codec": states.codec["name"],
        "fingerprint": cache.fingerprint,
    }


def preset_row(name: str, measured: Measured) -> dict[str, Any]:
    found = dataclasses.asdict(measured.presets[name])
    return {"source": f"kdcache: {PRESETS[name].description}", "is_preset": True, **found}


# --------------------------------------------------------------------------------------------- published layouts


def peer_rows(sample: Sample, top: Targets, samples: Samples, measured: Measured) -> dict[str, dict[str, Any]]:
    """Measure every published layout on the same rows, and on the samples that the preset ``sampled`` stores."""
    whole = TeacherSample(sample.vocab_size, TopLogprobs(top.ids_PK, top.logprobs_PK), every_draw(samples))
    rows = {}
    for name, peer in PEERS.items():
        try:
            encoded, encode_s = best_of_two(partial(peer.encode, whole))
        except ConfigError as error:
            print(f"{name} is left out: {error}")
            continue
        decoded, decode_s = best_of_two(encoded.decode)
        distances = sampled_distances if isinstance(peer, SampledPeer) else kept_distances
        rows[name] = {
            "source": peer.source,
            "is_preset": False,
            "bytes_per_token": encoded.num_bytes / sample.num_positions,
            **distances(sample, top, decoded, measured),
            "encode_tokens_per_s": sample.num_positions / encode_s,
            "decode_tokens_per_s": sample.num_positions / decode_s,
        }
    return rows


def every_draw(samples: Samples) -> np.ndarray:
    """Return the id of every sample, [P, N], of rows with N samples each."""
    flat = np.repeat(samples.ids_PJ.reshape(-1), samples.counts_PJ.reshape(-1))
    return flat.reshape(len(samples.ids_PJ), -1)


def sampled_distances(sample: Sample, top: Targets, decoded: PeerRows, measured: Measured) -> dict[str, Any]:
    rows = rows_of(decoded, np.full(sample.num_positions, -np.inf), sample)
    error = batch_mean_error(rows, measured.reference.means_QV)
    nothing = {"kept_mass": None, "codec_kl": None, "within_tail_kl": None, "full_kl": {}}
    return {**nothing, "batch_mean_error": {"samples": error}}


def kept_distances(sample: Sample, top: Targets, decoded: PeerRows, measured: Measured) -> dict[str, Any]:
    """Return distances where the missing mass is one more token; ``codec_kl_renormalised`` compares kept ids alone."""
    exact = first(top, decoded.ids_PJ.shape[1])
    ghost_P = np.maximum(1 - decoded.probs_PJ.sum(axis=1, dtype=np.float64), _LEAST_GHOST)
    exact_rows, rows = Rows.of_targets(exact, sample.vocab_size), rows_of(decoded, np.log(ghost_P), sample)
    spreads = {"uniform": Spread.uniform(sample.vocab_size, sample.num_positions)}
    found = compare(exact_rows, rows, exact.entropy_P, spreads, measured.reference.means_QV)
    found["codec_kl_renormalised"] = compare(
        exact_rows.renormalised(), rows.renormalised(), exact.entropy_P, {}, measured.reference.means_QV
    )["codec_kl"]
    return {"kept_mass": float(-np.expm1(exact.log_tail_P.astype(np.float64)).mean()), **found}


def rows_of(decoded: PeerRows, log_tail_P: np.ndarray, sample: Sample) -> Rows:
    with np.errstate(divide="ignore"):
        return Rows.of(decoded.ids_PJ, np.log(decoded.probs_PJ), log_tail_P, sample.vocab_size)


def first(targets: Targets, top_k: int) -> Targets:
    """Return targets with fewer ids and the exact tail mass."""
    dropped_P = np.exp(targets.logprobs_PK[:, top_k:].astype(np.float64)).sum(axis=1)
    log_tail_P = np.log(np.exp(targets.log_tail_P.astype(np.float64)) + dropped_P)
    return dataclasses.replace(
        targets,
        ids_PK=targets.ids_PK[:, :top_k],
        logprobs_PK=targets.logprobs_PK[:, :top_k],
        log_tail_P=log_tail_P,
    )


# ------------------------------------------------------------------------------------------------------ details


def compact_bound(plan: Plan, measured: Measured) -> dict[str, float]:
    """Return the size of compact's arrays against their entropy, and the speed of the two steps of reading them."""
    codec = targets_codec(plan.field("targets").codec, plan.targets, plan.tokenizer.vocab_size)
    targets = measured.kept[plan.targets].targets
    arrays = codec.encode(targets)
    records = {array.path: array for array in codec.arrays()}
    by_path = {path: arrays[record.name].astype(record.dtype) for path, record in records.items()}
    sizes = {f"{name}_bytes": len(pack({name: arrays[name]})) for name in ("topk_ranks", "topk_gaps", "id_table")}
    bounds = {f"{name}_entropy_bytes": column_entropy_bytes(arrays[name]) for name in ("topk_ranks", "topk_gaps")}
    packed = pack(by_path)
    expected = {path: (record, len(by_path[path])) for path, record in records.items()}
    opened, unpack_s = best_of_two(partial(unpack, packed, expected, "compact"))
    values = {record.name: opened[path] for path, record in records.items()}
    _, decode_s = best_of_two(lambda: codec.decode(codec.open(values)))
    count = targets.num_positions
    per_token = {name: size / count for name, size in (sizes | bounds).items()}
    # Left to the device: sums along K, the id table and the normalisation; what remains is unpacking.
    speeds = {"unpack": unpack_s, "decode": decode_s, "unpack_and_decode": unpack_s + decode_s}
    return per_token | {f"{name}_tokens_per_s": count / seconds for name, seconds in speeds.items()}


def column_entropy_bytes(values_PK: np.ndarray) -> float:
    """Return the bytes of all values at the empirical order-0 entropy of each column, Miller and Madow's correction in.

    Without it, columns of ids that mostly occur once would seem almost free.
    """
    total_bits = 0.0
    for column in values_PK.T:
        counts = np.unique(column, return_counts=True)[1]
        nats = -(counts * np.log(counts / len(column))).sum() + (len(counts) - 1) / 2
        total_bits += nats / np.log(2)
    return float(total_bits / 8)


def layer_errors(cache: Cache) -> dict[str, dict[str, float | None]]:
    """Return the relative error of every codec of hidden states on the layers of ``cache``; None if unsupported."""
    names = cache.manifest.hidden_layers
    count = min(int(np.searchsorted(np.cumsum(cache.lengths_N), _LAYER_POSITIONS)) + 1, len(cache))
    batch = cache.read(range(count), fields=names)
    found: dict[str, dict[str, float | None]] = {}
    for name in names:
        found[name] = {}
        for codec in VECTOR_CODECS:
            try:
                found[name][codec] = relative_error(vector_codec({"name": codec}), batch.hidden[name])
            except TeacherError:  # float16 cannot hold it
                found[name][codec] = None
    return found


if __name__ == "__main__":
    main()
