"""The engine: run directory, fingerprints, resume, locks and events; the plan; one short file a stage."""
