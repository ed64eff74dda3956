"""From a finished run to weights that others load by name: float16, package, cards, the Hub."""
