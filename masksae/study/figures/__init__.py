"""Pictures, from rows of results; one look for all."""
