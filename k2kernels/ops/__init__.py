"""The public ops: one file per op, each with checks, registration, fake and backward, in that order."""
