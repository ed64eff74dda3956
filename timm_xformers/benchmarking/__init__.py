"""How fast attention is, in pairs: every contender in every round, and ratios within a round.

* `settings`: what to measure; the one module that needs no torch. `cases`: the points and the
  contenders that follow from it, and what does not fit together.
* `layers`, `peers`: the contenders: ours, timm's, and those of other packages, each with what it
  has in common with ours. `steps`: what is timed.
* `timing`: clocks and rounds. `worker`: the process that measures.
* `compare`: ratios, crossovers and growth. `tables`, `plots`: what is written.
* `benchmark`: all of it in order.
"""
