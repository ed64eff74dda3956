"""Training and evaluation of timm models; needs the extra ``timm-xformers[train]``.

This package reaches models only through `timm.create_model`, so it trains timm's own names as well
as ours. Here lies one run, from a recipe to a record, in the order in which it is best read:

* `recipe`: every setting, with its bounds.
* `train`: the run; `evaluate` and `metrics`: what is measured of its weights.
* `session`, `build`, `optim`, `devices`: what it works with.
* `loop`: one epoch; `order`: which sample is drawn when, as a function of the seed; `stages`:
  growing images.
* `checkpoint`, `atomic`, `stopping`: states that survive kills and damage.
* `folder`, `results`, `history`, `curves`, `confusion`, `progress`, `trackers`: what it leaves.
* `errors`: failures that a user can repair. `catalog`: what our models cost and our mechanisms can;
  the one module that needs no extra.

Rooms beside it: `images` (from files to batches), `comparing` (report), `selecting` (select),
`planning` (what training costs, before it is paid), `benchmarking` (how fast attention is) and
`commands` (the flags of each command).
"""
