"""One module a command; each defines one click object named ``command``, listed in ``adasplash_cli.main.COMMANDS``."""
