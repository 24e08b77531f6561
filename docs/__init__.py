"""The pages of the documentation. They ship inside the package, where `phi3-lora docs` finds them."""
