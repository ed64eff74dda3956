"""What training costs, before it is paid.

* `dryrun`: a few measured steps, multiplied.
* `scaling`, `scaling_check`: the arithmetic of many GPUs, and how well it predicts small runs.
* `throughput`, `throughput_cases`, `throughput_report`: our trainer beside timm's, in pairs.
"""
