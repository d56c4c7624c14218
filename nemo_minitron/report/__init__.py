"""One page on a run, for people: what was made smaller, by how much, what it cost, and how to do it again.

``run_folder`` and ``curves`` read what a run left, ``measures`` and ``words`` say it in numbers and in plain English,
``figures`` and ``maps`` draw it, ``page`` puts it together. Nothing here needs NeMo or a device.
"""
