"""Write the golden caches: once for every format version, never again (``python -m tests.golden.make``).

A cache that was written by an older kdcache must open for ever and decode to the same numbers. What is committed here
stands for all caches out there, so this script refuses to touch what exists.
"""

from pathlib import Path

import numpy as np

from kdcache.cache import Cache, open_cache
from kdcache.codecs import TOPK_CODECS
from kdcache.schema import FORMAT_VERSION
from tests.synthetic import SyntheticCache

ROOT = Path(__file__).parent

VARIANTS = {
    **{f"v{FORMAT_VERSION}-{name}": {"codec": name} for name in TOPK_CODECS},
    f"v{FORMAT_VERSION}-packed-hidden": {"codec": "compact", "packed": True, "hidden": ("hidden-1", "hidden-2")},
}


def decoded(cache: Cache) -> dict[str, np.ndarray]:
    """Everything that a reader hands out, by name."""
    batch = cache.read(range(len(cache)), hidden=cache.manifest.hidden_layers)
    arrays = {
        "tokens": batch.tokens_T,
        "token_offsets": batch.token_offsets_N1,
        "position_offsets": batch.position_offsets_N1,
        "loss_mask": batch.loss_mask_P,
        **vars(batch.targets),
        **batch.hidden,
    }
    if batch.segment_ids_T is not None:
        arrays["segment_ids"] = batch.segment_ids_T
    return arrays


def main() -> None:
    for name, settings in VARIANTS.items():
        path = ROOT / name
        if path.exists():
            print(f"{name} exists and stays as it is")
            continue
        SyntheticCache(num_sequences=7, top_k=6, vocab_size=300, seed=7, **settings).write(path / "cache")
        (path / "cache" / ".lock").unlink(missing_ok=True)
        np.savez_compressed(path / "decoded.npz", **decoded(open_cache(str(path / "cache"))))
        print(f"{name} written")


if __name__ == "__main__":
    main()
