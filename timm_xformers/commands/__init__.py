"""One module per command: its flags, and the library call behind it. No torch until it runs."""
