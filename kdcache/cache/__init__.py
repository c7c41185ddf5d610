"""The cache: plan, shards, manifest; writing, reading, verifying (numpy, zarr, pyarrow, fsspec; never torch)."""

from kdcache.cache.fields import targets_field, token_arrays
from kdcache.cache.order import epoch_order
from kdcache.cache.reader import Cache, open_cache
from kdcache.cache.shard_data import ShardData
from kdcache.cache.writer import CacheWriter

__all__ = [
    "Cache",
    "CacheWriter",
    "ShardData",
    "epoch_order",
    "open_cache",
    "targets_field",
    "token_arrays",
]
