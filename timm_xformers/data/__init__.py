"""From files to batches.

* `data`: the splits of a run and their batches; everything below serves it.
* `sources`, `shards`, `shard_writer`, `rawsplit`: where images come from.
* `subset`, `readable`: which of them are used.
* `preprocessing`: how an image becomes a model's input.
* `memory`, with `augment`, `rand_augment` and `pixel_ops`: small sets, held and changed in batches.
* `loader`: others, decoded by worker processes.
"""
