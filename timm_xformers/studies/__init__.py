"""Several runs at once: compared (report), or searched for the best recipe (select)."""
