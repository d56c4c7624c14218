"""What we export, as several versions of transformers load it."""
