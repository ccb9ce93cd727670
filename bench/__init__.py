"""Speed of the ops and of whole steps: `python -m bench --help`."""
