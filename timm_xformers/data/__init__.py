"""From files to batches.

* `data`: the splits of a run and their batches; everything below serves it.
* `sources`: where images come from, by `folders` (with `trees` and `label_file`), `hub` and
  `shards`; `known_sets` has those with a short name, `shard_writer` writes.
* `split`: images with their labels, whatever keeps them; `digest`: whether they are still the same.
* `subset`, `classes`, `damaged`: which of them are used, under which number.
* `pixels`, `preprocessing`: how a picture becomes a model's input.
* `memory`, with `augment`, `rand_augment` and `pixel_ops`: small sets, held and changed in batches.
* `loader`: others, decoded by worker processes.
"""
