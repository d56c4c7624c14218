"""Facts of a model: its shape, the table of its parameters, and a plain decoder that computes it."""
