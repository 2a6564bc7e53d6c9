"""Training a student: the trainer, its parts, and whole runs that save a stock model."""
