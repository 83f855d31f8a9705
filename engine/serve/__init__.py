"""Many requests: files of them, drawn in process or on a cluster."""
