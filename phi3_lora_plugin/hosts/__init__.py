"""One small module a host, imported only on demand."""
