"""``python -m nemo_minitron COMMAND …``, the same as ``minitron COMMAND …``."""

import sys

from nemo_minitron.cli import console

if __name__ == "__main__":  # guarded: saving a checkpoint spawns a process that imports this module again
    sys.exit(console())
