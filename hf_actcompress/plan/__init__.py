"""Before training: what compression would do to a model, which codecs fit it, and how fast a pipeline would run."""
