"""How a catalogue of each version before becomes one of this: a module of ``versions`` for each step."""
