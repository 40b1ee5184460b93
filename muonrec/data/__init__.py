"""Interaction logs to sequences to batches: readers, order and split, shards and manifest, loader, semantic ids."""
