"""A run without Prefect: plan by demand, then stage by stage open, compute, seal."""
