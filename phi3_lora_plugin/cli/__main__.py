"""`python -m phi3_lora_plugin.cli`, for launchers that start modules: `accelerate launch -m phi3_lora_plugin.cli`."""

from phi3_lora_plugin.cli import main

if __name__ == "__main__":
    main()
