"""What training costs, before it is paid.

* `catalog`: models and mechanisms, with what they cost and can.
* `dryrun`: a few measured steps, multiplied.
* `scaling`: the arithmetic of many GPUs.
"""
