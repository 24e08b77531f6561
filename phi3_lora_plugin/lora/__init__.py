"""LoRA on Phi-3: targets, slices of fused projections, injection, state, layouts."""
