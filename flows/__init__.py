"""Prefect flows over the stages of a run, and the command line. Only this layer knows Prefect."""
