"""Ties a fork server to the process that it serves: such a server runs nothing of ours but imports, this one first.

Without it a server whose parent was killed would import all that it was told to before it looks. What it imports next
says no more than in a command of its own.
"""

from nemo_minitron.jobs import lifeline, processes

lifeline.hold()
processes.quiet()
