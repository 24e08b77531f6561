"""Models that people take for members of the family, and why each is refused and what is possible instead."""

#: `model_type` -> the reason, as a sentence's part.
REFUSED = {
    "phi": "Phi-1, 1.5 and 2 have another architecture (`phi`); PEFT has targets of its own for them",
    "phi3small": "Phi-3-small runs only through remote code, which is never executed here; try Phi-3-mini or -medium",
    "phi3_v": "Phi-3-vision runs only through remote code, which is never executed here; try Phi-3.5-mini for text",
    "phi4mm": "this layout of Phi-4-multimodal runs only through remote code, which is never executed here; "
    "transformers' own layout (`phi4_multimodal`) is revision refs/pr/70 of microsoft/Phi-4-multimodal-instruct, and "
    "its text side trains here: model.revision=refs/pr/70",
    "phi4flash": "Phi-4-mini-flash-reasoning is SambaY (Mamba layers, gated memory units, differential attention), "
    "which transformers does not have: it runs only through remote code, which is never executed here; for the same "
    "chats train microsoft/Phi-4-mini-reasoning",
    "llama": "a Llama-layout copy of Phi-3 has other module names than the model it was made from; "
    "use the original, and `phi3-lora convert` for its adapters",
    "mistral": "a Mistral-layout copy of Phi-3 has other module names than the model it was made from; "
    "use the original, and `phi3-lora convert` for its adapters",
}

#: Hub ids (lower case) of models that are refused, and their `model_type`, so that they are before any download.
REFUSED_IDS = {
    "microsoft/phi-4-mini-flash-reasoning": "phi4flash",
    "microsoft/phi-4-multimodal-instruct": "phi4mm",
    "microsoft/phi-3-small-8k-instruct": "phi3small",
    "microsoft/phi-3-small-128k-instruct": "phi3small",
    "microsoft/phi-3-vision-128k-instruct": "phi3_v",
    "microsoft/phi-3.5-vision-instruct": "phi3_v",
}
