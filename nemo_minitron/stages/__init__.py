"""One small module per command: ``run(cfg)`` reads its files, calls the floors below, writes its files."""
