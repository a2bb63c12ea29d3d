"""Training, generation, evaluation: what the programs at the root call."""

import util as util  # before torch: see there
