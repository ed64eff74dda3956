"""Training of timm models; needs the extra ``timm-xformers[train]``.

This package reaches models only through `timm.create_model`, so it trains timm's own names as well
as ours. Here lies one run, from a recipe to a record, in the order in which it is best read:

* `train`: the run, from the start or resumed.
* `session`: data, devices, model and optimiser of a run, and one epoch of it (`Session.run_epoch`).
* `loop`: the updates of an epoch; `stages`: progressive resizing; `metrics`: evaluation.
* `build`, `optim`, `devices`, `compiling`, `sharding`: the model and what it is trained with.
* `checkpoint`: states that survive kills and damage; `signals`: requests to stop.
* `run_log`, `trackers`: what is said. `defaults`: what is trained if no model was named.
"""
