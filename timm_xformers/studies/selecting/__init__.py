"""``timm-xformers select``: a recipe chosen by validation alone.

* `selection`: the whole of it.
* `space`, `trials`: what is tried, from a grid or by Optuna.
* `folds`, `search`: one configuration trained and measured; who works on which.
* `ranking`: which is best, and the files that show it.
"""
