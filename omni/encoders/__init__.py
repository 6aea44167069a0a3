"""Vision and audio encoders: what both families share, and what differs, a file per family and modality."""
