"""Training, sampling and evaluation."""

import util as util  # before torch: it looks for the working directory
