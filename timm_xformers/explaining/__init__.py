"""What a model looks at: the weight of each token in each block, as numbers and as a picture."""
