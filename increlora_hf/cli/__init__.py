"""The program `increlora`."""
