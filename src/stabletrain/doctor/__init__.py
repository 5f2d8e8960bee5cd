"""The doctor: what may go wrong in a run, and what went wrong in a step."""
