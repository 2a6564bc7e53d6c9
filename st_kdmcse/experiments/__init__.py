"""Many models: grids of training runs, their comparison over seeds, and the report."""
