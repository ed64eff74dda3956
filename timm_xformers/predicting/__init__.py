"""A trained model on pictures: what it takes them for, as a table, JSON or a sheet of pictures."""
