"""About an installation: what runs here (info), whether it is right (verify), what a step costs (method_costs)."""
