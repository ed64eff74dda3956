"""What a cheaper attention would cost a trained model, measured without training it.

* `losses`: how far a model with other mechanisms is from itself, on real images.
* `search`: a mechanism per block under a budget, by losses of the whole model.
* `report`: the table, the files and the plot.
* `analyse`: all of it in order; time and memory are `timm_xformers.benchmarking`'s.
"""
