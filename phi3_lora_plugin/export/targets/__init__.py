"""Export targets, one module each with `export`; registered under the module's name, or its `NAME`."""
