"""The ``adasplash`` command line: ``main.py`` and one file a command in ``commands``."""
