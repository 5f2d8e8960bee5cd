"""Incidents: steps that went wrong, on disk with all that it takes to run them again.

One folder an incident, `incidents/000000120/`, named after the step's number in the whole run:

- `incident.pt`: microbatches and the samples' indices, position, seed, loss scaler, the guard's memory;
- `state.pt`: parameters, buffers, optimizer and what the loss remembers, before the step; one file for all incidents
  between two updates;
- `verdict.json`: what was decided and why, the samples found bad, statistics of every tensor; it may be added to;
- `config.yaml`: the settings;
- `manifest.json`: sizes and hashes of the others but `verdict.json`.
"""

from stabletrain.incident.files import Incident, incident_folders, load_incident
from stabletrain.incident.store import IncidentStore

__all__ = ["Incident", "IncidentStore", "incident_folders", "load_incident"]
