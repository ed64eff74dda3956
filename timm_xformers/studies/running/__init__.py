"""``timm-xformers study``: models x data sets x seeds under one recipe.

* `definition`: what the file says, and the runs that follow from it.
* `folder`: which of them are finished, by their records alone.
* `matrix`: trains the others, a process each; `plan` says before what they will take.
* `costs`: speed, memory and size of the arms, side by side.
* `differences`, `page`: what came of it, from the records.
"""
