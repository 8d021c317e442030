"""The demo: a real encoder finds sentences, every attention of it by fastattn."""
