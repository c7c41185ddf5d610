"""The cache: plan, shards, manifest; writing, reading, verifying (numpy, zarr, pyarrow, fsspec; never torch)."""

from kdcache.cache.order import epoch_order
from kdcache.cache.reader import Cache, open_cache
from kdcache.cache.shard_builder import ShardBuilder
from kdcache.cache.shard_data import ShardData
from kdcache.cache.writer import CacheWriter

__all__ = [
    "Cache",
    "CacheWriter",
    "ShardBuilder",
    "ShardData",
    "epoch_order",
    "open_cache",
]
