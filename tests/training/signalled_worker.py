"""The training script, which gets a signal when it writes a file: usage END interrupt|kill OPTION ..."""

import os
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2] / "training")]

from file_events import at_path, interrupt, kill_group
from train_flickr import main

os.setpgid(0, 0)
at_path(sys.argv[1], {"interrupt": interrupt, "kill": kill_group}[sys.argv[2]])
main(sys.argv[3:])
