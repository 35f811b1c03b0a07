"""What a run leaves behind, how it survives and how it ends."""
