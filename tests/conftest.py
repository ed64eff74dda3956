"""Settings for all tests."""

import torch

# Most tensors here are tiny: a second thread costs more in barriers than it computes.
torch.set_num_threads(1)
