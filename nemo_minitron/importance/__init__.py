"""Importance: what each neuron, head, query group, hidden channel and layer is worth, and the file that says so."""
