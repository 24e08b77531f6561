"""What `--external_plugins` is given: ms-swift runs this file, in the main process and in each worker it spawns."""

from phi3_lora_plugin.hosts.swift.register import register

register()
