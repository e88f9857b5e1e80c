"""The seed's demos, as programs of its SDK, and our examples (docs/examples), against running processes."""
