"""`python impatient.py SECONDS train …`: the command, whose processes wait only so long."""

import signal
import sys

from qlora_kit.cli import main
from qlora_kit.parallel import data_parallel

# A job in the background is born with SIGINT ignored, and the kit would respect that.
signal.signal(signal.SIGINT, signal.default_int_handler)
data_parallel.STEP_SECONDS = float(sys.argv.pop(1))

if __name__ == "__main__":
    main()
