"""From files to batches; a text passes read, build, shards, pack, sampler, loader, in this order."""
