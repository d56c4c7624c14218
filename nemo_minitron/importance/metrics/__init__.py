"""One file for each importance metric, found by its name (:data:`nemo_minitron.registry.METRICS`).

Such a file holds ``METRIC``, whose ``name`` is the file's; :mod:`nemo_minitron.importance.metric` says what it must be.
"""
