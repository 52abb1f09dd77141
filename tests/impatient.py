"""`python impatient.py SECONDS train …`: the command, whose processes wait only so long."""

import sys

from qlora_kit.cli import main
from qlora_kit.parallel import data_parallel

data_parallel.STEP_SECONDS = float(sys.argv.pop(1))

if __name__ == "__main__":
    main()
