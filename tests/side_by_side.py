"""What processes of their own do with a run; they import it from here."""

import os
import signal

from file_events import at_path

from st_kdmcse.experiments import grid


def tell(options):
    """The error of a run that is over at once."""
    return None if options.seed else "seed 0"


def be_killed(options):
    """Die of what no process survives."""
    if options.seed == 1:
        os.kill(os.getpid(), signal.SIGKILL)


def train_and_interrupt(options):
    """Train, and send Ctrl-C to the first process at the tenth step of one run."""
    if options.seed == 0:
        at_path("checkpoint-10/trainer_state.json", lambda: os.kill(os.getppid(), signal.SIGINT))
    return grid.train_or_go_on(options)
