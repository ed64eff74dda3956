"""What a run leaves behind: its folder, and the files in it by their names."""
