"""Training and evaluation of timm models; needs the extra ``timm-xformers[train]``.

This package reaches models only through `timm.create_model`, so it trains timm's own names as well
as ours. The modules, from the outside in:

* `train`, `evaluate`: one run from a recipe to a record.
* `recipe`: every setting of a run, with its bounds.
* `data`, `sources`, `subset`, `readable`: where images come from and which of them are used.
* `memory`, `augment`, `rand_augment`, `pixel_ops`, `loader`: how they become batches.
* `order`: which sample is drawn when, as a function of the seed.
* `build`, `optim`, `loop`: the model, what updates it, one epoch.
* `catalog`: what our models cost and our mechanisms can; the one module that needs no extra.
* `checkpoint`, `results`, `history`, `curves`, `confusion`, `progress`, `trackers`: what a run
  leaves behind.
* `runs`, `groups`, `report`, `report_plots`: finished runs side by side.
* `throughput`, `throughput_cases`, `throughput_report`: images per second beside timm's train.py.
"""
