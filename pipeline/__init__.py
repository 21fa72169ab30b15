"""The shared spine of the three stages, by import, and their front door, by process (`python -m pipeline run`)."""
