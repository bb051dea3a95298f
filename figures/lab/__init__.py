"""What scripts and figures use beside the method: constants, data, runs, reports and baselines."""

import warnings

# Avalanche warns of missing QP solvers, which only GEM needs, and of evaluators without loggers.
warnings.filterwarnings("ignore", message=".*QP solver.*")
warnings.filterwarnings("ignore", message="No loggers specified")
