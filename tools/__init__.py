"""What only release work and our own evidence need; not part of the wheel."""
