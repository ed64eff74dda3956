"""A model as a file for other runtimes, compared with the model it was made from."""
