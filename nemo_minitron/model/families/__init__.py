"""One file for each family of models, found by its name (:data:`nemo_minitron.registry.FAMILIES`)."""
