"""What every value of a key of NeMo's or Lightning's does in a training: the tables, and the check of a config."""
