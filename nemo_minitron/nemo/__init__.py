"""NeMo at the edge: model classes, trainer, restore and save. Importing this package alone loads nothing heavy."""
