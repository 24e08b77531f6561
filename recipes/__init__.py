"""YAML presets. `phi3-lora recipes` lists them; each is a test case."""
