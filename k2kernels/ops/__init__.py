"""The public ops, a file or a package for each: public functions with their checks, launch bodies, declarations."""
