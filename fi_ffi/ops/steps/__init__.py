"""What functions share that do more than call one entry."""
