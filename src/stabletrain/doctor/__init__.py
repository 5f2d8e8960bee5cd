"""Why a step went bad, and what helps; before a run, what may go bad."""
