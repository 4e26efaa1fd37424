"""Flow matching over weights."""
