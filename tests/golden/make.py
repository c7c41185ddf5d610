"""Write the golden caches: once for every format version, never again (``python -m tests.golden.make``).

A cache that was written by an older kdcache must open for ever and decode to the same numbers. What is committed here
stands for all caches out there, so this script refuses to touch what exists.
"""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from kdcache.cache import Cache, open_cache
from kdcache.codecs import TOPK_CODECS
from kdcache.dump import dump_teacher
from kdcache.schema import FORMAT_VERSION, TargetsRecord
from tests.synthetic import SyntheticCache
from tests.task_models import TINY_TASKS, dump_config

ROOT = Path(__file__).parent

VARIANTS: dict[str, dict[str, Any]] = {
    **{name: {"codec": name} for name in TOPK_CODECS},
    "packed-hidden": {"codec": "compact", "packed": True, "hidden": ("hidden-1", "hidden-2")},
    "ragged": {"codec": "compact", "record": TargetsRecord(top_k=12, min_prob=0.01, min_mass=0.95)},
    "temperatures-prior": {
        "codec": "compact",
        "record": TargetsRecord(top_k=6, temperatures=(0.5, 2.0, 4.0), tail_prior=True),
    },
    "sampled": {"codec": "compact", "record": TargetsRecord(kind="sampled", top_k=0, num_samples=30, seed=3)},
    "hybrid": {"codec": "compact", "record": TargetsRecord(kind="hybrid", top_k=4, num_samples=300)},
    "few-scalars": {"codec": "compact", "record": TargetsRecord(top_k=6, scalars=("log_tail",))},
    "remainder": {
        "codec": "fp16",
        "record": TargetsRecord(top_k=6, scalars=("gold_logprob",), tail="remainder"),
    },
    "renormalised": {"codec": "compact", "record": TargetsRecord(top_k=6, probabilities="kept")},
    "token-vectors": {"codec": "compact", "token_vectors": (2, 3)},
    "hidden-int8": {
        "codec": "compact",
        "record": TargetsRecord(kind="hidden", top_k=1),
        "hidden": ("hidden-1",),
        "hidden_codec": "int8",
    },
}

#: Caches of other tasks than causal-lm: dumps of tiny teachers, by task, with the codec of their raw outputs.
TASK_VARIANTS = {
    "masked": ("masked-lm", "exact"),
    "classes": ("sequence-classification", "exact"),
    "outputs": ("embedding", "int8"),
}


def decoded(cache: Cache) -> dict[str, np.ndarray]:
    """Everything that a reader hands out, by name."""
    batch = cache.read(range(len(cache)), fields=cache.manifest.vector_fields)
    targets = vars(batch.targets)
    samples = {} if batch.targets.samples is None else vars(batch.targets.samples)
    arrays = {
        "tokens": batch.tokens_T,
        "token_offsets": batch.token_offsets_N1,
        "position_offsets": batch.position_offsets_N1,
        "loss_mask": batch.loss_mask_P,
        **{name: values for name, values in targets.items() if name != "samples"},
        **{f"samples_{name}": values for name, values in samples.items()},
        **dict(zip(("merged_ids", "merged_logprobs", "merged_log_tail"), batch.targets.merged(), strict=True)),
        **batch.hidden,
        "segment_ids": batch.segment_ids_T,
        "labels": batch.labels_P,
        "token_index": batch.token_index_P,
        "tail_prior": cache.tail_prior_V,
    }
    if cache.manifest.targets.kind == "hidden":
        arrays["lm_head"] = np.frombuffer(cache.lm_head_file(), np.uint8)
    return {name: values for name, values in arrays.items() if values is not None}


def write(variant: str, path: Path) -> None:
    """Write the cache of a variant to ``path``."""
    if variant in TASK_VARIANTS:
        task, codec = TASK_VARIANTS[variant]
        with tempfile.TemporaryDirectory() as directory:
            found = TINY_TASKS[task].write(Path(directory))
            outputs = {"outputs": {"codec": codec}}
            dump_teacher(dump_config(task, found, path, shard_positions=9, **outputs), progress=False)
        return
    settings = {"num_sequences": 7, "top_k": 6, "vocab_size": 300, "seed": 7, **VARIANTS[variant]}
    SyntheticCache(**settings).write(path)


def main() -> None:
    for variant in (*VARIANTS, *TASK_VARIANTS):
        name = f"v{FORMAT_VERSION}-{variant}"
        path = ROOT / name
        if path.exists():
            print(f"{name} exists and stays as it is")
            continue
        write(variant, path / "cache")
        (path / "cache" / ".lock").unlink(missing_ok=True)
        np.savez_compressed(path / "decoded.npz", **decoded(open_cache(str(path / "cache"))))
        print(f"{name} written")


if __name__ == "__main__":
    main()
