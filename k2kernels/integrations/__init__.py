"""Other projects' names over the public ops, so that code written for them runs unchanged."""
