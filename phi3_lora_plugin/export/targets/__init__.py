"""Export targets, one module each; `plugins.builtin` registers them through the same hook as anybody else's."""
